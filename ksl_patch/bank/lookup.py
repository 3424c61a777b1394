"""What a reader of a bank sees: four device tensors and the lookup in them; and how a patch is put into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ksl_patch.errors import BankError

# A bucket of the hash table is one cache line: eight entries of (token id << 32 | bank row). An empty one has an id
# that nobody asks for, not even as padding, where runtimes have -1.
WIDTH = 8
LOW = 0xFFFFFFFF
EMPTY = -(1 << 63)
# Odd numbers of 31 bits, drawn once.
_MULTIPLIERS = [int(m) | 1 for m in np.random.default_rng(0).integers(1 << 30, 1 << 31, 16)]


@dataclass(frozen=True)
class SlotRows:
    """What one slot replaces: token_ids int64 [k], rows [k, d], and whether the head's rows change too.

    output_rows: [k, d] for the head; None with `output` means the same rows.
    prompt_only: the rows act on the prompt's positions alone.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    output: bool = False
    output_rows: torch.Tensor | None = None
    prompt_only: bool = False


class BankTensors:
    """The four tensors of a bank at one moment. Whoever takes them together sees one state of it.

    rows: [R, d]. entries: int64 [E, 8], buckets of (token id << 32 | bank row) or EMPTY, as all of bucket 0 is.
    outputs: int64 [P], runs of the same for the head's rows of the slots that change it, entry 0 being nobody's.
    table: int64 [S, 5], a slot's first bucket, mask, multiplier, and first entry and number of entries in `outputs`;
    slot 0 is the base, and an empty slot finds nothing, as the base.
    """

    def __init__(self, rows: torch.Tensor, entries: torch.Tensor, outputs: torch.Tensor, table: torch.Tensor) -> None:
        self.rows, self.entries, self.outputs, self.table = rows, entries, outputs, table

    @classmethod
    def empty(
        cls, rows: int, d: int, buckets: int, outputs: int, slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> BankTensors:
        """Tensors of these sizes in which no slot finds anything."""
        return cls(
            torch.zeros(rows, d, dtype=dtype, device=device),
            torch.full((buckets, WIDTH), EMPTY, device=device),
            torch.zeros(outputs, dtype=torch.int64, device=device),
            torch.zeros(slots, 5, dtype=torch.int64, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device, spare room included."""
        return sum(tensor.nbytes for tensor in (self.rows, self.entries, self.outputs, self.table))

    def lookup(self, slots: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Bank row of each position, or -1 for the base's own row.

        slots: int64, broadcastable to token_ids' shape; token_ids: int64 or int32, where -1, padding, is nobody's.
        Returns int64 of that shape.
        One bucket is read for each position: multiply-shift hashing, with a multiplier that keeps a slot's
        buckets from overflowing (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair
        problem", 1997).
        """
        first, mask, multiplier, _, _ = self.table[slots].unbind(-1)
        token_ids = token_ids.long()
        bucket = first + (((token_ids * multiplier) >> 16) & mask)
        found = self.entries[bucket]  # [..., 8]
        match = (found >> 32) == token_ids.unsqueeze(-1)
        return torch.where(match, found & LOW, -1).amax(dim=-1)

    def head_entries(self, slots: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `width` entries of the head's rows of each slot, int64 [..., width], and whether it has any.

        What is over in a line repeats its first entry, so that what is written twice is the same.
        """
        _, _, _, start, count = self.table[slots].unbind(-1)
        step = torch.arange(width, device=self.table.device)
        inside = step < count.unsqueeze(-1)
        return self.outputs[start.unsqueeze(-1) + torch.where(inside, step, 0)], (count > 0).unsqueeze(-1)


def check_rows(patch: SlotRows, vocab_size: int, hidden_size: int) -> None:
    """Raise BankError unless the patch fits a table [vocab_size, hidden_size]."""
    ids = patch.token_ids.cpu().numpy()
    if not ids.size or ids.min() < 0 or ids.max() >= vocab_size or not np.diff(np.sort(ids)).all():
        raise BankError(f"the patch's token ids must be different, from 0 to {vocab_size - 1}, and at least one.")
    for rows in (patch.rows, patch.output_rows):
        if rows is not None and tuple(rows.shape) != (len(ids), hidden_size):
            raise BankError(
                f"rows of shape {list(rows.shape)} do not fit {len(ids)} token ids of a table with "
                f"{hidden_size} values a row."
            )


def fewest_buckets(count: int) -> int:
    """Buckets that the hash table of `count` ids has at least, a power of two."""
    return 1 << max(0, math.ceil(math.log2(count / 3)))


def hash_ids(token_ids: np.ndarray) -> tuple[int, int, np.ndarray]:
    """A table for a set of ids: number of buckets, multiplier, and each id's place in the buckets, int64 [k]."""
    buckets = fewest_buckets(len(token_ids))
    while True:
        for multiplier in _MULTIPLIERS:
            bucket = ((token_ids * multiplier) >> 16) & (buckets - 1)
            if np.bincount(bucket, minlength=buckets).max() <= WIDTH:
                order = np.argsort(bucket, kind="stable")
                ordered = bucket[order]
                # The place inside a bucket: how many of the ids before it in order are in the same bucket.
                place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
                positions = np.empty(len(order), dtype=np.int64)
                positions[order] = ordered * WIDTH + place
                return buckets, multiplier, positions
        buckets *= 2


def bucket_entries(token_ids: np.ndarray, rows: np.ndarray, buckets: int, positions: np.ndarray) -> np.ndarray:
    """The buckets of a slot, int64 [buckets, 8], whose ids are in these bank rows int64 [k]."""
    entries = np.full((buckets, WIDTH), EMPTY, dtype=np.int64)
    entries.reshape(-1)[positions] = (token_ids << 32) | rows
    return entries
