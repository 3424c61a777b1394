"""Names that vLLM does not know: files of configured folders, digests of the local store, and ORG/REPO of the Hub."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

from cachetools import TTLCache
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.names import check_name
from ksl_patch.store.hub import HubReference, fetch
from ksl_patch.store.local import Store, is_digest
from ksl_patch.store.sign import PublicKey, load_signed
from ksl_patch.vllm.settings import Settings

logger = logging.getLogger("vllm.ksl_patch")
_REFUSED = 1024  # names that are remembered as nobody's
_SECONDS = 5.0  # and for how long


def inside(path: Path, folders: tuple[str, ...]) -> Path:
    """A patch file's real path. Raises PatchError for one that is, or leads, outside the folders."""
    roots = [Path(folder).resolve() for folder in folders]
    for candidate in [path] if path.is_absolute() else [root / path for root in roots]:
        real = candidate.resolve()
        if any(real.is_relative_to(root) for root in roots) and real.suffix == ".safetensors" and real.is_file():
            return real
    raise PatchError(f"{str(path)[:200]!r} is not a .safetensors file in the folders that patches may come from.")


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


class PatchResolver(LoRAResolver):  # type: ignore[misc]
    """NAME is NAME.safetensors of a configured folder; 64 digits are a digest of the store; ORG/REPO is the Hub's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._refused: TTLCache[str, bool] = TTLCache(_REFUSED, _SECONDS)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of a name, its file in the store, or None. vLLM gives it an id of its own.

        A name that is nobody's is looked up again after some seconds and not before.
        """
        key = hashlib.sha256(lora_name.encode(errors="replace")).hexdigest()  # names may be long
        if key in self._refused:
            return None
        try:
            path = await asyncio.to_thread(self._find, lora_name)
        except PatchError as error:
            self._refused[key] = True
            logger.warning("ksl_patch: %r is not served: %s", lora_name[:100], error)
            return None
        return LoRARequest(lora_name, 1, str(path))

    def _find(self, name: str) -> Path:
        store = Store()
        if "/" in name:
            return store.add(from_hub(name, self._settings))
        check_name(name)
        if is_digest(name):
            return store.path(from_store(name, self._settings).digest)
        return store.add(from_folders(Path(f"{name}.safetensors"), self._settings))
