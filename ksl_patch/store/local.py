"""The local store: patch files by the digest of their content."""

from __future__ import annotations

import os
import re
from pathlib import Path

from platformdirs import user_cache_path

from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch

_DIGEST = re.compile(r"[0-9a-f]{64}")


def default_root() -> Path:
    """KSL_PATCH_HOME, or a folder of the user's cache."""
    home = os.environ.get("KSL_PATCH_HOME")
    return Path(home) if home else user_cache_path("ksl_patch")


class Store:
    """A folder of patch files, each under the digest of what it does. A file in it never changes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def path(self, digest: str) -> Path:
        """Where the patch of a digest is, or would be. Raises PatchError for what is not a digest."""
        if not _DIGEST.fullmatch(digest):
            raise PatchError(f"{digest[:80]!r} is not a digest: it has 64 digits of 0-9 and a-f.")
        return self.root / "patches" / f"{digest}.safetensors"

    def add(self, patch: Patch) -> Path:
        """Put a patch into the store, unless it is there, and return its file. Raises PatchError."""
        path = self.path(patch.digest)
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PatchError(f"cannot make {path.parent}: {error.strerror or error}.") from error
            patch.save(path)
        return path

    def get(self, digest: str) -> Patch:
        """The patch of a digest. Raises PatchError when it is not there, or is not what its name says."""
        path = self.path(digest)
        patch = Patch.load(path)
        if patch.digest != digest:
            raise PatchError(f"{path} holds {patch.digest}: delete the file and add the patch again.")
        return patch
