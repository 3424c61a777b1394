"""Where a patch's rows act: the same rows, but only at some positions of the prompt and of what follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ksl_patch.base import find_embedding
from ksl_patch.data.encoding import IGNORED, Encoded, collate, source_tokens
from ksl_patch.errors import RunError
from ksl_patch.evidence.outputs import Outputs, of_completions
from ksl_patch.hf import Completion, attach, complete
from ksl_patch.overlay import TrainedRows, slot_rows
from ksl_patch.patch import Patch
from ksl_patch.train.loss import answer_losses

Place = Literal["everywhere", "prompt", "template", "source", "target"]
PLACES: tuple[Place, ...] = ("everywhere", "prompt", "template", "source", "target")


@dataclass(frozen=True)
class _Positions:
    """Where rows act in one example: a flag for each token of its prompt, and one for all that follow."""

    prompt: list[bool]
    after: bool


def run_at(
    model: Any,
    tokenizer: Any,
    held_out: Encoded,
    patch: Patch,
    place: Place,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> Outputs:
    """What the model does when the rows act at one place alone, teacher-forced and in its own greedy output.

    prompt: the template and the source sentence. template: the prompt without the sentence. source: the sentence
    alone. target: the answer alone, whether it is read or written. Raises RunError for a patch that changes the head
    too, and for a tokenizer that cannot say which characters a token covers.
    """
    if patch.meta.side != "input":
        raise RunError("where rows act can be seen on patches of side 'input'.")
    positions = []
    for example, pair in zip(held_out.examples, held_out.pairs, strict=True):
        inside = source_tokens(tokenizer, held_out.template, pair)
        if inside is None:
            raise RunError(
                "where rows act can be seen with a fast tokenizer only: others do not say what a token covers."
            )
        if len(inside) != len(example.prompt):
            raise RunError("the tokenizer splits a prompt otherwise than it did in training.")
        positions.append(
            {
                "everywhere": _Positions([True] * len(inside), True),
                "prompt": _Positions([True] * len(inside), False),
                "template": _Positions([not here for here in inside], False),
                "source": _Positions(inside, False),
                "target": _Positions([False] * len(inside), True),
            }[place]
        )
    examples, after = held_out.examples, positions[0].after
    losses, counts = [0.0] * len(examples), [0] * len(examples)
    completions: dict[int, Completion] = {}
    # In the orders that these two batch by, so that they keep them.
    for part in _batches(batch_size, [len(example.prompt) + len(example.answer) for example in examples]):
        labels = collate([examples[i] for i in part], pad=0)["labels"]
        where = (labels != IGNORED) & after
        for row, i in enumerate(part):  # padded on the right
            where[row, : len(positions[i].prompt)] = torch.tensor(positions[i].prompt)
        with acting(model, patch, where, after=False):
            found = answer_losses(model, [examples[i] for i in part], batch_size=len(part))
        for i, loss, count in zip(part, *found, strict=True):
            losses[i], counts[i] = loss, count
    for part in _batches(batch_size, [len(example.prompt) for example in examples]):
        width = max(len(examples[i].prompt) for i in part)
        where = torch.zeros(len(part), width, dtype=torch.bool)
        for row, i in enumerate(part):  # padded on the left
            where[row, width - len(positions[i].prompt) :] = torch.tensor(positions[i].prompt)
        with attach(model) as handle, acting(model, patch, where, after=after):
            prompts = [examples[i].prompt for i in part]
            ends = [examples[i].answer[-1] for i in part]
            outputs = complete(model, tokenizer, prompts, [0] * len(part), handle, max_new_tokens, None, ends)
            completions |= zip(part, outputs, strict=True)
    return of_completions([completions[i] for i in range(len(examples))], losses, counts)


@contextmanager
def acting(model: Any, patch: Patch, where: torch.Tensor, *, after: bool) -> Iterator[None]:
    """Within the block, rows are replaced at the columns that `where` marks, and behind those if `after` says so.

    where: bool [B, T], for the first T columns that the model sees. The block is for one batch, one forward or one
    `generate`: columns are counted from its beginning.
    """
    table = find_embedding(model)
    everywhere = replace(slot_rows(patch), prompt_only=False)
    rows, where = TrainedRows(table, everywhere), where.to(table.device)
    seen = 0

    def hook(scale: Any, token_ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        length = token_ids.shape[1]
        marked = torch.full(token_ids.shape, after, device=token_ids.device)
        known = where[:, seen : seen + length]
        marked[:, : known.shape[1]] = known
        seen += length
        return torch.where(marked[..., None], rows.embed(token_ids, output, scale), output)

    with ExitStack() as stack:
        for lookup in table.lookups:
            handle = lookup.module.register_forward_hook(
                lambda _, args, output, scale=lookup.scale: hook(scale, args[0], output)
            )
            stack.callback(handle.remove)
        yield


def _batches(size: int, lengths: list[int]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]
