"""Which pairs are for figures (held out), choices (dev), a training's end (validation) and training, in which order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from ksl_patch.data.pairs import Pair, distinct
from ksl_patch.errors import DataError


@dataclass(frozen=True)
class PairSplit:
    """Pairs for training, for its end (validation), for choices between patches (dev), for the figures (held_out).

    No source is in two of them. duplicates: how many were left out since their source occurs before. unused: how many
    belong to what is held out (a document, a source) and are not measured.
    """

    train: list[Pair]
    dev: list[Pair]
    held_out: list[Pair]
    duplicates: int
    unused: int
    validation: list[Pair] = field(default_factory=list)


def split_pairs(pairs: Sequence[Pair], *, held_out: int, dev: int = 0, validation: int = 0, seed: int = 0) -> PairSplit:
    """Drop repeated sources, set `held_out`, `dev` and `validation` pairs aside, keep the others to train.

    A hash of a pair's source, or of its document where it has one, says on which side it is: another pair in the file
    moves no more than itself and one at each border. No document is on two sides. What is set aside is in turns from
    its documents, so that the first of it are of as many as there are.
    """
    kept = distinct(pairs)

    def place(pair: Pair) -> tuple[bytes, bytes]:
        document = f"document {pair.group}" if pair.group else f"sentence {pair.key}"
        first, then = (hashlib.sha256(f"{seed}\n{text}".encode()).digest() for text in (document, pair.key))
        return first, then

    kept.sort(key=place)
    parts: list[list[Pair]] = []
    begin = 0
    for wanted in (held_out, dev, validation):
        end = begin + wanted
        while wanted and 0 < end < len(kept) and place(kept[end])[0] == place(kept[end - 1])[0]:
            end += 1  # to the end of the document, or of what has this source
        parts.append(_by_turns(kept[begin:end]))
        begin = end
    if begin >= len(kept):
        n = len({pair.group for pair in kept})
        documents = f" in {n} document{'s' if n > 1 else ''}, which stay whole" if any(p.group for p in kept) else ""
        stop, option = (f" and {validation} to stop by", ", --validation") if validation else ("", "")
        raise DataError(
            f"{held_out} pairs are to be held out and {dev} kept for choices{stop}, but there are only {len(kept)} "
            f"with different sources{documents}; give more pairs or hold out fewer (--held-out, --dev{option})."
        )
    # One source may be in several documents, with other fields: it is on the side of the figures, then of the choices.
    known: set[str] = set()
    aside = []
    for part, wanted in zip(parts, (held_out, dev, validation), strict=True):
        aside.append([pair for pair in part if pair.key not in known][:wanted])
        known |= {pair.key for pair in part}
    train = [pair for pair in kept[begin:] if pair.key not in known]
    return PairSplit(
        train=train,
        held_out=aside[0],
        dev=aside[1],
        validation=aside[2],
        duplicates=len(pairs) - len(kept),
        unused=len(kept) - len(train) - sum(map(len, aside)),
    )


def _by_turns(pairs: Sequence[Pair]) -> list[Pair]:
    """Of each document its first pair, then of each its second; a pair without a document is one by itself."""
    seen = Counter[str]()
    turns = []
    for pair in pairs:
        turns.append(seen[pair.group])
        seen[pair.group] += bool(pair.group)
    return [pairs[i] for i in sorted(range(len(pairs)), key=turns.__getitem__)]


def reading_order(pairs: int, reads: int, seed: int) -> list[int]:
    """Which pair each of `reads` reads takes: all of them in a random order, then in another; a shorter one's is a
    longer one's beginning.
    """
    random = np.random.default_rng(seed)
    passes: Iterator[list[int]] = (random.permutation(pairs).tolist() for _ in range(-(-reads // pairs)))
    return list(islice(chain.from_iterable(passes), reads))
