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

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if os.path.sep in base and not os.path.isdir(base) and not _looks_like_hub_id(base):  # noqa: PTH112
            raise RunError(f"cannot load the base: there is no folder {base}.") from error
        reason = str(error).strip().splitlines()
        raise RunError(f"cannot load the base {base}: {reason[0] if reason else type(error).__name__}") from error
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def _looks_like_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "/", "~"))
