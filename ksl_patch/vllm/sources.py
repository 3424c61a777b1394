"""Loads the patch that a request names: from the server's folders, the local store, or the Hub."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ksl_patch.errors import PatchError, RunError
from ksl_patch.patch import Patch
from ksl_patch.patch.file import SUFFIX
from ksl_patch.store.hub import HubReference, fetch
from ksl_patch.store.local import Store
from ksl_patch.store.sign import PublicKey, load_signed
from ksl_patch.vllm.settings import Settings


class PatchFile(BaseModel):
    """What to load: a file's path, in the configured folders, a digest of the local store, or ORG/REPO of the Hub."""

    model_config = ConfigDict(extra="forbid")
    path: str | None = Field(None, max_length=4096)
    digest: str | None = Field(None, max_length=64)
    hub: str | None = Field(None, max_length=1024)


class NamedPatchFile(PatchFile):
    """The same and the name it is to have; by default its own."""

    name: str | None = Field(None, max_length=96)


def open_file(file: PatchFile, settings: Settings) -> Patch:
    """The patch that a request names, which has one of the three. Raises PatchError, RunError."""
    if file.digest is not None:
        return from_store(file.digest, settings)
    if file.hub is not None:
        return from_hub(file.hub, settings)
    if "\0" in (file.path or ""):
        raise RunError("the path has a NUL in it.")
    return from_folders(Path(file.path or ""), settings)


def inside(path: Path, folders: tuple[str, ...]) -> Path:
    """A patch file's real path. Raises PatchError for one that is, or leads, outside the folders."""
    roots = [Path(folder).resolve() for folder in folders]
    for candidate in [path] if path.is_absolute() else [root / path for root in roots]:
        real = candidate.resolve()
        if any(real.is_relative_to(root) for root in roots) and real.suffix == SUFFIX and real.is_file():
            return real
    raise PatchError(f"{str(path)[:200]!r} is not a {SUFFIX} file in the folders that patches may come from.")


def from_folders(path: Path, settings: Settings) -> Patch:
    """A patch of the configured folders, signed where a key is configured. Raises PatchError."""
    return _load(inside(path, settings.folders), settings)


def from_store(digest: str, settings: Settings) -> Patch:
    """A patch of the local store, signed where a key is configured. Raises PatchError."""
    patch = Store().get(digest)
    if settings.key is not None and _load(Store().path(digest), settings).digest != digest:
        raise PatchError(f"the store's {digest} has changed while it was read: try again.")
    return patch


def from_hub(reference: str, settings: Settings) -> Patch:
    """A patch of an allowed organisation, signed where a key is configured. Raises PatchError."""
    organisation = HubReference.parse(reference).organisation
    if organisation not in settings.orgs:
        raise PatchError(f"this server takes no patches of {organisation} on the Hub.")
    return _load(fetch(reference).path, settings)


def _load(path: Path, settings: Settings) -> Patch:
    return Patch.load(path) if settings.key is None else load_signed(path, PublicKey.load(Path(settings.key)))
