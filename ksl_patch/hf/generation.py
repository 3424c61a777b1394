"""Greedy generation in mixed batches, a patch or the base for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ksl_patch.base import find_embedding
from ksl_patch.errors import RunError
from ksl_patch.hf.attach import attach
from ksl_patch.hf.handle import PatchHandle
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. stopped: it ended by itself with an end-of-sequence token, the last one."""

    text: str
    stopped: bool
    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens it wrote."""
        return len(self.token_ids)


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


def end_token_id(model: Any, tokenizer: Any) -> int:
    """The token id that ends an answer in training: the tokenizer's own, or the first of `end_token_ids`.

    A template may name another (`TemplateMeta.end_token_id`).
    """
    ids = end_token_ids(model, tokenizer)
    return ids[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    patches: Sequence[Patch | None],
    *,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    ends: Sequence[int | None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy completions of prompts (token ids), one patch or None (the base) for each, in mixed batches.

    Every patch must have passed `patch.check(model)`. A patch of scope "prompt" acts on the prompt only.
    ends: for each prompt a token id that ends its answer beside `end_token_ids`, such as its template's.
    advance: is told after each batch how many prompts it answered.
    """
    distinct = list({id(patch): patch for patch in patches if patch is not None}.values())
    with attach(model) as handle:
        slot_of = {id(patch): handle.bank.add(slot_rows(patch)) for patch in distinct}
        slots = [slot_of.get(id(patch), 0) for patch in patches]
        return complete(model, tokenizer, prompts, slots, handle, max_new_tokens, batch_size, ends, advance)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    slots: list[int],
    handle: PatchHandle,
    max_new_tokens: int,
    batch_size: int | None,
    ends: Sequence[int | None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy completions of prompts on a model with patches attached, the bank's slot for each."""
    common = end_token_ids(model, tokenizer)
    own = [{*common, *([] if end is None else [end])} for end in ends or [None] * len(prompts)]
    V = find_embedding(model).vocab_size
    if (largest := max((token for prompt in prompts for token in prompt), default=0)) >= V:
        raise RunError(
            f"the tokenizer gives token {largest}, and the base's table has {V} rows: the tokenizer is not this base's."
        )
    pads = (tokenizer.pad_token_id, *common)  # masked: any that the table has will do
    pad = next((token for token in pads if token is not None and 0 <= token < V), 0)
    size = batch_size or len(prompts) or 1
    # Prompts of like length together: less padding. The results go back in the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        # What ends one row must not end another: it is cut afterwards.
        all_end = sorted(set.intersection(*(own[i] for i in part)))
        with handle.serving([slots[i] for i in part]):
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
                eos_token_id=all_end,
                pad_token_id=pad,
            )
        for i, new in zip(part, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(new) if token in own[i]), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True)
            written = tuple(new if end is None else new[: end + 1])
            completions[i] = Completion(text=text, stopped=end is not None, token_ids=written)
        if advance is not None:
            advance(len(part))
    return [completions[i] for i in range(len(prompts))]
