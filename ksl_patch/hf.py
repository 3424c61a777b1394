"""Patches on transformers models: loading a base, and generating with another patch for every prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ksl_patch.errors import RunError
from ksl_patch.overlay import Overlay, SlotRows, overlaid
from ksl_patch.patch import Patch


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. stopped: it ended by itself with an end-of-sequence token."""

    text: str
    stopped: bool
    tokens: int


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


def slot_rows(patch: Patch) -> SlotRows:
    """A patch in the overlay's terms."""
    return SlotRows(patch.token_ids, patch.rows, patch.meta.side == "input+output", patch.output_rows)


def prompt_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Token ids of prompts. chat: the text carries its own special tokens and none are added."""
    return [tokenizer(prompt, add_special_tokens=not chat).input_ids for prompt in prompts]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end a generation: the model's own and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    ids = sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    if not ids:
        raise RunError("the tokenizer has no end-of-sequence token, so nothing would end a generation.")
    return ids


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    patches: Sequence[Patch | None],
    *,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
) -> list[Completion]:
    """Greedy completions of prompts (token ids), one patch or None (the base) for each, in mixed batches.

    Every patch must have passed `patch.check(model)`. A patch of scope "prompt" acts on the prompt only.
    """
    distinct = list({id(patch): patch for patch in patches if patch is not None}.values())
    slot_of = {id(patch): slot for slot, patch in enumerate(distinct, start=1)}
    slots = [slot_of.get(id(patch), 0) for patch in patches]
    if not distinct:
        return _batches(model, tokenizer, prompts, slots, None, [], max_new_tokens, batch_size)
    prompt_only = [slot_of[id(patch)] for patch in distinct if patch.meta.scope == "prompt"]
    with overlaid(model, [slot_rows(patch) for patch in distinct]) as overlay:
        return _batches(model, tokenizer, prompts, slots, overlay, prompt_only, max_new_tokens, batch_size)


@torch.no_grad()
def _batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    slots: list[int],
    overlay: Overlay | None,
    prompt_only: list[int],
    max_new_tokens: int,
    batch_size: int | None,
) -> list[Completion]:
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    size = batch_size or len(prompts) or 1
    # Prompts of like length together: less padding. The results go back in the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        after_prompt = None
        if overlay is not None:
            overlay.use([slots[i] for i in part])
            after_prompt = [_PromptScope(overlay, [0 if slots[i] in prompt_only else slots[i] for i in part])]
        output = model.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=pad,
            logits_processor=after_prompt,
        )
        for i, new in zip(part, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True)
            completions[i] = Completion(text=text, stopped=end is not None, tokens=len(new) if end is None else end + 1)
    return [completions[i] for i in range(len(prompts))]


class _PromptScope:
    """Called by `generate` after each forward: from the first on, only rows of scope "all" stay patched."""

    def __init__(self, overlay: Overlay, slots: list[int]) -> None:
        self._overlay, self._slots = overlay, slots

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._overlay.use(self._slots)
        return scores


def _looks_like_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "/", "~"))
