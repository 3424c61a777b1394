"""The runtime for vLLM: patches served by name beside the base, each request its own; hf/ is the other.

`plugin.register` is found by entry point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ksl_patch.errors import PatchError

if TYPE_CHECKING:
    import os

    from vllm.lora.request import LoRARequest

    from ksl_patch.patch import Patch


def lora_request(
    patch: Patch | str | os.PathLike[str] | None = None,
    name: str | None = None,
    *,
    language: str | None = None,
    config: str | os.PathLike[str] | None = None,
) -> LoRARequest:
    """What `LLM.generate(..., lora_request=)` and `AsyncLLM.generate` take for a patch or a patch file.

    language: in place of a patch a BCP 47 tag, which gets the patch of the nearest region among those of a
    `patches.toml` (config), of equally near ones the first, or among the names of the local store.

    The patch is put into the local store; vLLM reads it from there by its digest, so that what a request began with
    stays the same whatever happens to the file. Raises PatchError, where no patch speaks the language, too, or patches
    of several bases do; DataError for what is no language's tag; RunError for what is no patches.toml.
    """
    from vllm.lora.request import LoRARequest

    from ksl_patch.patch import Patch
    from ksl_patch.patch.names import check_name
    from ksl_patch.store.local import Store

    if (patch is None) == (language is None) or (config is not None and language is None):
        raise PatchError("a request is for a patch, or for a language (of a config): give one of the two.")
    if patch is None:
        assert language is not None
        spoken, patch = _by_language(language, config)
        name = name or spoken
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    # 31 bits are what vLLM's V2 runner keeps of an id; the engine refuses two contents of one id.
    number = int(patch.digest[:8], 16) % (2**31 - 1) + 1
    return LoRARequest(check_name(name or patch.meta.name), number, str(Store().add(patch)))


def _by_language(language: str, config: str | os.PathLike[str] | None) -> tuple[str, Patch]:
    """The name and the patch that speak a language."""
    from pathlib import Path

    from ksl_patch.patch.by_language import ByLanguage, check_tag
    from ksl_patch.store.local import Store
    from ksl_patch.store.lock import read_config
    from ksl_patch.store.references import load

    check_tag(language)
    if config is None:
        store = Store()
        patches = {name: store.get(digest) for name, digest in store.names().items()}
    else:
        patches = {name: load(reference) for name, reference in read_config(Path(config)).patches.items()}
    of: dict[str, ByLanguage] = {
        base: ByLanguage({n: p.meta.language for n, p in patches.items() if p.meta.base.fingerprint == base})
        for base in {each.meta.base.fingerprint for each in patches.values()}
    }
    found = [choice.name for each in of.values() if (choice := each.choose([language])).name is not None]
    if len(found) > 1:
        raise PatchError(f"patches of several bases speak {language!r} ({', '.join(sorted(found))}): name the config.")
    if not found:
        where = "the local store" if config is None else str(config)
        raise PatchError(f"no patch of {where} speaks {language!r}.")
    return found[0], patches[found[0]]
