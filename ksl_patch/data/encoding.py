"""Pairs as token ids in a template, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch

from ksl_patch.data.pairs import Pair, data_digest
from ksl_patch.errors import DataError
from ksl_patch.hf import prompt_ids
from ksl_patch.patch import TemplateMeta

IGNORED = -100  # transformers' label of a position without loss


class Example(NamedTuple):
    """A pair as token ids: the rendered prompt, then the answer with the token that ends it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Encoded:
    """Pairs and their token ids, in one order, and the template that they were put into."""

    pairs: list[Pair]
    examples: list[Example]
    template: TemplateMeta

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, n: int | None) -> Encoded:
        """The first n of them; all for None."""
        return replace(self, pairs=self.pairs[:n], examples=self.examples[:n])

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest reference, with its end."""
        return max(len(example.answer) for example in self.examples)

    @property
    def groups(self) -> list[str] | None:
        """The document of each pair; None where they have none."""
        groups = [pair.group for pair in self.pairs]
        return groups if any(groups) else None

    @property
    def references(self) -> list[str]:
        """The translations to compare with."""
        return [pair.target for pair in self.pairs]

    @property
    def digest(self) -> str:
        """sha256 over the pairs."""
        return data_digest(self.pairs)


def encode(
    template: TemplateMeta, pairs: Sequence[Pair], tokenizer: Any, end: int, max_length: int | None = None
) -> Encoded:
    """Token ids of each pair; pairs longer than `max_length` tokens are left out, none for None.

    The prompt is tokenised exactly as it will be at generation; the answer is what follows it when prompt
    and target are tokenised together, wherever the tokenizer keeps the prompt's own tokens apart, and `end` unless
    the template names another. Behind reserved tokens it is cut as in the base's own prompt: a tokenizer may begin
    a text anew behind them, and losses per token compare only where the tokens are the same.
    """
    end = end if template.end_token_id is None else template.end_token_id
    base = template.of_base()
    prompts = prompt_ids(tokenizer, [pair.prompt(base) for pair in pairs], chat=base.chat)
    own = prompts
    if base != template:
        own = prompt_ids(tokenizer, [pair.prompt(template) for pair in pairs], chat=template.chat)
    # An answer stands off by a space where the prompt does not end in white space: "Spanish:" -> " Hola".
    gap = (base.before_answer or "") if base.chat else "" if base.text[-1:].isspace() else " "
    whole = prompt_ids(tokenizer, [pair.prompt(base) + gap + pair.target for pair in pairs], chat=base.chat)
    kept, examples = [], []
    for prompt, before, full, pair in zip(own, prompts, whole, pairs, strict=True):
        if full and full[-1] == end:  # a tokenizer that adds the end itself
            full = full[:-1]
        apart = full[: len(before)] == before
        answer = full[len(before) :] if apart else tokenizer(gap + pair.target, add_special_tokens=False).input_ids
        example = Example(prompt, [*answer, end])
        if max_length is None or len(example.prompt) + len(example.answer) <= max_length:
            kept.append(pair)
            examples.append(example)
    return Encoded(kept, examples, template)


def source_tokens(tokenizer: Any, template: TemplateMeta, pair: Pair, *, fields: bool = False) -> list[bool] | None:
    """Which tokens of the rendered prompt cover a character of the source sentence; None where a tokenizer cannot say.

    What it adds by itself, such as a token of the beginning, covers none. fields: or a character of another column.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    values, pieces = {**dict(pair.fields), "source": pair.source}, template.pieces()
    texts = [values[piece] if i % 2 else piece for i, piece in enumerate(pieces)]
    ends = list(accumulate(map(len, texts)))
    filled = [i for i in range(1, len(pieces), 2) if fields or pieces[i] == "source"]
    encoded = tokenizer(pair.prompt(template), add_special_tokens=not template.chat, return_offsets_mapping=True)
    return [
        # A token of spaces may cover nothing, at its place; what a tokenizer adds covers nothing at an end.
        any(first < ends[i] and last > ends[i - 1] for i in filled)
        for first, last in encoded.offset_mapping
    ]


def token_counts(examples: Iterable[Example], vocab_size: int, *, prompt_only: bool = False) -> np.ndarray:
    """How often each token id is an input where a patch acts: int64 [V]. prompt_only: of scope "prompt".

    Raises DataError for an id that the table has no row for.
    """
    # The last token is only ever predicted.
    inputs = ([*e.prompt, *(() if prompt_only else e.answer[:-1])] for e in examples)
    counts = np.bincount(np.fromiter(chain.from_iterable(inputs), dtype=np.int64), minlength=vocab_size)
    check_ids([[len(counts) - 1]], vocab_size)
    return counts


def check_ids(sequences: Iterable[Iterable[int]], vocab_size: int) -> None:
    """Raise DataError for a token id that a table of so many rows has not."""
    largest = max(chain.from_iterable(sequences), default=0)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, and the base's table has {vocab_size} rows: the tokenizer is not "
            "this base's."
        )


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A right-padded batch, int64 [B, T]: input_ids, attention_mask, and labels for the answer alone."""
    width = max(len(e.prompt) + len(e.answer) for e in examples)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(e.prompt + e.answer, pad) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * (len(e.prompt) + len(e.answer)), 0) for e in examples]),
        "labels": torch.tensor([padded([IGNORED] * len(e.prompt) + e.answer, IGNORED) for e in examples]),
    }
