"""What a model does on held-out pairs: loss, and for its greedy output the figures that must not be mixed.

Raw output, first line, stopping and length are separate: see docs/experiments.md for why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from ksl_patch.hf import Completion, generate
from ksl_patch.patch import Patch
from ksl_patch.train.data import IGNORED, Example, collate


@dataclass(frozen=True)
class Scores:
    """chrf: chrF2 of the raw output; chrf_first_line: of its first line alone (sacrebleu, 0 to 100).

    stop_rate: share of outputs that ended by themselves; characters: mean length of the raw output.
    """

    chrf: float
    chrf_first_line: float
    stop_rate: float
    characters: float

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


@torch.no_grad()
def token_loss(model: Any, examples: Sequence[Example], *, batch_size: int = 8) -> float:
    """Mean negative log-likelihood per answer token, in nats, over all tokens of all examples."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    for start in range(0, len(ordered), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(ordered[start : start + batch_size], pad=0).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        answer = labels != IGNORED
        total += float(F.cross_entropy(logits[answer].float(), labels[answer], reduction="sum"))
        count += int(answer.sum())
    return total / count


def translate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    patch: Patch | None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> list[Completion]:
    """Greedy output for the prompt of each example, with a patch or, for None, the base."""
    prompts = [example.prompt for example in examples]
    return generate(
        model, tokenizer, prompts, [patch] * len(prompts), max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def score(completions: Sequence[Completion], references: Sequence[str]) -> Scores:
    """Compare outputs with reference translations, one for each."""
    from sacrebleu.metrics import CHRF

    raw = [completion.text.strip() for completion in completions]
    return Scores(
        chrf=CHRF().corpus_score(raw, [references]).score,
        chrf_first_line=CHRF().corpus_score([first_line(text) for text in raw], [references]).score,
        stop_rate=fmean(completion.stopped for completion in completions),
        characters=fmean(map(len, raw)),
    )


def first_line(text: str) -> str:
    """The first line of an output, where a translation is."""
    return (text.strip().splitlines() or [""])[0]
