"""What processes of test_store.py do; importing it takes neither transformers nor a model."""

from pathlib import Path

from ksl_patch import Patch
from ksl_patch.store.local import Store


def add_many(root, files):
    """Add some patch files under one name, one after the other."""
    for file in files:
        Store(root).add(Patch.load(file), "shared")


def add_forever(root, folder):
    """Add the patches of a folder under seven names until somebody ends it."""
    files, turn = sorted(Path(folder).iterdir()), 0
    while True:
        Store(root).add(Patch.load(files[turn % len(files)]), f"n{turn % 7}")
        turn += 1
