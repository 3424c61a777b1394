"""The loss of answers, from the logits that predict their tokens and no others.

A head over 262,144 tokens costs more than twice what the layers of a small model cost; prompts and padding have no
loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from ksl_patch.data.encoding import IGNORED, Example, collate
from ksl_patch.errors import RunError

Marking = Callable[[torch.Tensor], AbstractContextManager[None]]  # of bool [B, T], where a forward pass has the prompt


def answer_logits(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """What predicts the labels, float [N, V]: a row for each label after the first column that is not IGNORED.

    batch: of the forward pass, without its labels. labels: int64 [B, T]; the rows are in the order of
    `labels[:, 1:][labels[:, 1:] != IGNORED]`. The head gets the hidden states of those positions alone, as one row of
    N; what the model does to logits after its head (scales, soft caps) it does to these. A model whose head is not
    called with a hidden state for each position computes all logits.
    """
    predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # [B, T]
    called = False

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal called
        if args[0].shape[:-1] != predicts.shape:
            return args
        called = True
        return (args[0][predicts.to(args[0].device)][None], *args[1:])  # [1, N, d]

    head = getattr(model, "module", model).get_output_embeddings()  # torch's DistributedDataParallel has no such method
    hook = None if head is None else head.register_forward_pre_hook(keep)
    try:
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if called else logits[predicts.to(logits.device)]


@torch.no_grad()
def answer_losses(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, marking: Marking | None = None
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each example's answer, in nats, and the number of its tokens.

    marking: of the handle whose patches the model answers with, so that those of scope "prompt" act on prompts alone.
    """
    losses, counts = [0.0] * len(examples), [0] * len(examples)
    for part, each, answer in _losses(model, examples, batch_size, marking):
        for i, loss, count in zip(part, each.double().sum(dim=1).tolist(), answer.sum(dim=1).tolist(), strict=True):
            losses[i], counts[i] = loss, count
    if not math.isfinite(sum(losses)):
        raise RunError("the model's loss on these pairs is not a number: its rows or its weights are too large.")
    return losses, counts


@torch.no_grad()
def losses_by_token(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, marking: Marking | None = None
) -> list[list[float]]:
    """Negative log-likelihood of each token of each example's answer, the end last; see `answer_losses`."""
    losses: list[list[float]] = [[] for _ in examples]
    for part, each, answer in _losses(model, examples, batch_size, marking):
        for i, row, mask in zip(part, each, answer.to(each.device), strict=True):
            losses[i] = row[mask].tolist()
    return losses


def _losses(
    model: Any, examples: Sequence[Example], batch_size: int, marking: Marking | None
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Which examples are in a batch, their tokens' losses float [B, T], 0 but where bool [B, T] says, of the answer."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].answer))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in collate([examples[i] for i in part], pad=0).items()}
        labels = batch.pop("labels")
        with nullcontext() if marking is None else marking(labels == IGNORED):
            logits = answer_logits(model, batch, labels)
        labels = labels[:, 1:]
        answer = labels != IGNORED
        each = torch.zeros(labels.shape, device=logits.device)
        each[answer] = F.cross_entropy(logits.float(), labels[answer].to(logits.device), reduction="none")
        yield part, each, answer


def token_loss(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, marking: Marking | None = None
) -> float:
    """Mean negative log-likelihood per answer token, in nats, over all tokens of all examples; see `answer_losses`."""
    losses, counts = answer_losses(model, examples, batch_size=batch_size, marking=marking)
    return sum(losses) / sum(counts)
