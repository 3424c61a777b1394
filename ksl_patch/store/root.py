"""Where the local store is, and which names it has: what a shell completes with, and so without torch."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def default_root() -> Path:
    """KSL_PATCH_HOME, or a folder of the user's cache."""
    home = os.environ.get("KSL_PATCH_HOME")
    return Path(home) if home else user_cache_path("ksl_patch")


def stored_names() -> list[str]:
    """The names in the local store, whatever they stand for."""
    folder = default_root() / "names"
    try:
        return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    except OSError:
        return []
