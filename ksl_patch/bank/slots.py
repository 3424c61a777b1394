"""The host's account of a growing bank: what a slot holds and where, and which lines of the tensors are free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ksl_patch.bank.lookup import SlotRows, check_rows, hash_ids


class Room(NamedTuple):
    """Lines of each tensor: what a slot takes (rows, a run of buckets, a run of the head's entries), or their sizes."""

    rows: int
    buckets: int
    outputs: int

    def plus(self, other: Room, times: int = 1) -> Room:
        """This much and, so many times, the other."""
        return Room(*(a + times * b for a, b in zip(self, other, strict=True)))

    def within(self, limit: Room) -> bool:
        """Whether there is as much of each."""
        return all(a <= b for a, b in zip(self, limit, strict=True))

    def or_more(self, other: Room) -> Room:
        """The larger of each."""
        return Room(*map(max, self, other))


NOTHING = Room(0, 0, 0)


@dataclass(eq=False)
class Slot:
    """What a slot holds, and where. `host` holds the rows of a slot that was evicted; else they are in the bank.

    token_ids: int64 [k]. output: whether the head's rows change. separate: whether those are rows of their own, behind
    the others. hashed: `hash_ids`. room: what it takes. bank_rows: its rows of the bank, None for an evicted slot.
    buckets, outputs: where its runs begin. holds: how many read it. retired: whether it goes when nobody does any more.
    events: what its readers on CUDA have come to.
    """

    token_ids: np.ndarray
    output: bool
    separate: bool
    prompt_only: bool
    hashed: tuple[int, int, np.ndarray]
    room: Room
    bank_rows: np.ndarray | None = None
    buckets: int = 0
    outputs: int = 0
    host: torch.Tensor | None = None
    holds: int = 0
    retired: bool = False
    events: list[torch.cuda.Event] = field(default_factory=list)

    @classmethod
    def of(cls, patch: SlotRows, vocab_size: int, hidden_size: int) -> tuple[Slot, torch.Tensor]:
        """A patch's slot, which is nowhere yet, and its rows [k, d] or [2k, d]. Raises BankError as `check_rows`."""
        check_rows(patch, vocab_size, hidden_size)
        ids, rows = patch.token_ids.cpu().numpy(), patch.rows.detach()
        separate = patch.output_rows is not None
        if patch.output_rows is not None:
            rows = torch.cat([rows, patch.output_rows.detach().to(rows)])
        hashed = hash_ids(ids)
        room = Room(len(rows), hashed[0], run_length(len(ids)) if patch.output else 0)
        return cls(ids, patch.output, separate, patch.prompt_only, hashed, room), rows

    @property
    def present(self) -> np.ndarray:
        """The bank's lines that a slot on the device has its rows in, int64 [k] or [2k]."""
        assert self.bank_rows is not None
        return self.bank_rows

    def line(self, buckets: int, outputs: int) -> np.ndarray:
        """The slot's line of the table, for runs that begin there."""
        buckets_count, multiplier, _ = self.hashed
        return np.array([buckets, buckets_count - 1, multiplier, outputs, len(self.token_ids) if self.output else 0])


class Runs:
    """Runs of a tensor's lines. A freed run is used again for its own length."""

    def __init__(self) -> None:
        self.used = 1  # the first line is nobody's
        self._free: dict[int, list[int]] = {}

    def end(self, length: int, freed: Collection[int] = ()) -> int:
        """How many lines the tensor must have for a run of this length, once runs of the lengths `freed` are given."""
        return self.used if not length or self._free.get(length) or length in freed else self.used + length

    def take(self, length: int) -> int:
        """The first line of a free run."""
        if not length:
            return 0
        free = self._free.get(length)
        if free:
            return free.pop()
        start, self.used = self.used, self.used + length
        return start

    def give(self, start: int, length: int) -> None:
        """Give a run back."""
        if length:
            self._free.setdefault(length, []).append(start)


class Gone:
    """What is free once some slots have gone."""

    def __init__(self) -> None:
        self.room, self.buckets, self.outputs = NOTHING, set[int](), set[int]()

    def add(self, room: Room) -> None:
        """One more slot goes."""
        self.room = self.room.plus(room)
        self.buckets.add(room.buckets)
        self.outputs.add(room.outputs)


def run_length(count: int) -> int:
    """Lines that are taken for so many: a power of two, so that a freed run suits others."""
    return 1 << (count - 1).bit_length()
