"""The runtime for vLLM: patches served by name beside the base, each request its own; hf/ is the other.

`plugin.register` is found by entry point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from vllm.lora.request import LoRARequest

    from ksl_patch.patch import Patch


def lora_request(patch: Patch | str | os.PathLike[str], name: str | None = None) -> LoRARequest:
    """What `LLM.generate(..., lora_request=)` and `AsyncLLM.generate` take for a patch or a patch file.

    The patch is put into the local store; vLLM reads it from there by its digest, so that what a request began with
    stays the same whatever happens to the file. Raises PatchError.
    """
    from vllm.lora.request import LoRARequest

    from ksl_patch.patch import Patch
    from ksl_patch.patch.names import check_name
    from ksl_patch.store.local import Store

    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    # 31 bits are what vLLM's V2 runner keeps of an id; the engine refuses two contents of one id.
    number = int(patch.digest[:8], 16) % (2**31 - 1) + 1
    return LoRARequest(check_name(name or patch.meta.name), number, str(Store().add(patch)))
