"""Loading a base: a causal language model and its tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch

from ksl_patch.errors import RunError


def load_base(
    base: str, *, revision: str | None = None, dtype: torch.dtype | str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder or the Hub, in evaluation mode.

    dtype: "auto" keeps the checkpoint's. device: "cuda" when there is one, else "cpu", by default.
    Never runs code from the repository. Raises RunError with one sentence.
    """
    import transformers

    device = _device(device)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
        if other := _no_causal_model(base, revision):
            raise RunError(f"{base} is {other}: give a causal language model.")
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except RunError:
        raise
    except Exception as error:  # of every kind, from transformers and what it builds on: a damaged file, say
        if os.path.sep in base and not os.path.isdir(base) and not _looks_like_hub_id(base):  # noqa: PTH112
            raise RunError(f"cannot load the base: there is no folder {base}.") from error
        raise RunError(f"cannot load the base {base}: {_reason(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise RunError(
            f"{base} has no weights for {missing[0]}{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}, "
            "which would be random ones: give a whole causal language model."
        )
    model.to(device)
    return model.eval(), tokenizer


def _device(name: str | None) -> str:
    """A device that is there. Raises RunError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(
            f"there is no device {name!r} here: use cpu, cuda, cuda:N or mps, as this machine has it."
        ) from error
    return name


def load_tokenizer(folder: str) -> Any:
    """A folder's own tokenizer. Raises RunError with one sentence."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise RunError(f"cannot load the tokenizer in {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    plain = isinstance(error, OSError | ValueError | ImportError) and lines
    return lines[0] if plain else f"{type(error).__name__} {lines[0] if lines else ''}".strip()


def _no_causal_model(base: str, revision: str | None) -> str | None:
    """What a checkpoint is of by its configuration, where that is no causal language model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    try:
        config = transformers.AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):  # an adapter's folder, or nothing, which the model's own loading says
        return None
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder ({config.model_type})"
    mappings = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    causal = {name.casefold() for mapping in mappings for name in mapping.values()}
    classes = {name.casefold() for name in dir(transformers)}
    named = config.architectures or ()
    names = [named] if isinstance(named, str) else [str(name) for name in named]
    # What transformers does not know is left to the weights.
    others = [name for name in names if name.casefold() in classes - causal and not name.endswith("Model")]
    return f"a {others[0]}" if others and len(others) == len(names) else None


def _looks_like_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "/", "~"))
