"""vLLM's resolver: a name that it does not know, looked up where sources.py may take patches from."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

from cachetools import TTLCache
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ksl_patch.errors import PatchError
from ksl_patch.patch.file import SUFFIX
from ksl_patch.patch.names import check_name
from ksl_patch.store.local import Store, is_digest
from ksl_patch.vllm.settings import Settings
from ksl_patch.vllm.sources import from_folders, from_hub, from_store

logger = logging.getLogger("vllm.ksl_patch")
_REFUSED = 1024  # names that are remembered as nobody's
_SECONDS = 5.0  # and for how long
# The languages of what was found, by name and path: the store has one description for equal rows.
resolved: dict[tuple[str, str], str | None] = {}


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
        if "/" not in name and is_digest(check_name(name)):
            return store.path(from_store(name, self._settings).digest)
        file = Path(f"{name}{SUFFIX}")
        patch = from_hub(name, self._settings) if "/" in name else from_folders(file, self._settings)
        path = store.add(patch)
        resolved[name, str(path)] = patch.meta.language
        return path
