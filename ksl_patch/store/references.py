"""A path, stored name, digest or hf:// address turned into a patch; a server's requests: vllm/sources.py.

A path, a name or digest of the local store (local.py), or hf://ORG/REPO/FILE (hub.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.file import SUFFIX
from ksl_patch.patch.names import is_name
from ksl_patch.store.hub import PREFIX, fetch
from ksl_patch.store.local import Store, is_digest


class Found(NamedTuple):
    """What a reference stands for. stored: the name of the local store that it is, None where it is none."""

    path: Path
    patch: Patch
    stored: str | None = None


def resolve(reference: str) -> Found:
    """The file and the patch of a reference. A file that is here goes before what is in the store, and that before a
    folder. Raises PatchError.
    """
    if reference.startswith(PREFIX):
        path = fetch(reference).path
        return Found(path, Patch.load(path))
    path = Path(reference)
    if _is_path(reference):
        return Found(path, Patch.load(path))
    store, name = Store(), None
    digest = reference if is_digest(reference) else None
    if digest is None and is_name(reference) and (digest := store.digest(reference)) is not None:
        name = reference
    if digest is None and path.is_dir():
        raise PatchError(f"{reference} is a folder, and the local store has no such name: name a patch file in it.")
    if digest is None:
        raise PatchError(f"cannot read {reference}: there is no such file, and no such name in the local store.")
    return Found(store.path(digest), store.get(digest), name)


def load(reference: str) -> Patch:
    """The patch of a reference, as `resolve` has it. Raises PatchError."""
    return resolve(reference).patch


def stored_name(reference: str) -> str | None:
    """The name of the local store that `resolve` takes a reference for; None for a path, a digest or nothing."""
    if _is_path(reference) or is_digest(reference) or not is_name(reference):
        return None
    return None if Store().digest(reference) is None else reference


def _is_path(reference: str) -> bool:
    path = Path(reference)
    return os.sep in reference or reference.endswith(SUFFIX) or (path.exists() and not path.is_dir())
