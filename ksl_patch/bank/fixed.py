"""A bank of a fixed shape, for a runtime that numbers the slots itself, as vLLM does."""

from __future__ import annotations

import numpy as np
import torch

from ksl_patch.bank.lookup import BankTensors, SlotRows, bucket_entries, check_rows, fewest_buckets, hash_ids
from ksl_patch.errors import BankError


class SlotBank:
    """Slots that each have room for `max_rows` rows: nothing ever grows.

    So whatever fits by itself fits whatever else is there, and CUDA graphs and compiled code stay right.

    slots: how many beside the base. max_rows: what one of them has room for, the head's own rows included.
    tensors: what a reader takes; the same for good.
    """

    def __init__(
        self,
        slots: int,
        max_rows: int,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.max_rows, self.vocab_size, self.hidden_size = max_rows, vocab_size, hidden_size
        self._buckets = 2 * fewest_buckets(max_rows)
        self.tensors = BankTensors.empty(
            slots * max_rows, hidden_size, 1 + slots * self._buckets, 1 + slots * max_rows, 1 + slots, dtype, device
        )
        self._changes_head: set[int] = set()

    @property
    def changes_head(self) -> bool:
        """Whether any slot changes the head's rows."""
        return bool(self._changes_head)

    def check(self, patch: SlotRows) -> None:
        """Raise BankError unless `write` would take the patch."""
        self._fit(patch)

    def _fit(self, patch: SlotRows) -> tuple[int, int, np.ndarray]:
        """The patch's `hash_ids`, once it is known to fit."""
        check_rows(patch, self.vocab_size, self.hidden_size)
        count = len(patch.token_ids) * (1 if patch.output_rows is None else 2)
        if count > self.max_rows:
            raise BankError(f"the patch has {count} rows, and a slot has room for {self.max_rows}: reserve more.")
        if patch.prompt_only:
            raise BankError("the patch acts on the prompt only, which a bank of this kind cannot do.")
        hashed = hash_ids(patch.token_ids.cpu().numpy())
        if hashed[0] > self._buckets:
            raise BankError("the patch's token ids do not fit the bank's hash table: reserve more rows a slot.")
        return hashed

    def write(self, slot: int, patch: SlotRows) -> None:
        """Give a slot, 1 to `slots`, new content. Raises BankError as `check` does."""
        buckets, multiplier, positions = self._fit(patch)
        ids = patch.token_ids.cpu().numpy()
        first_row, first_bucket = (slot - 1) * self.max_rows, 1 + (slot - 1) * self._buckets
        k, to = len(ids), self.tensors
        taken = first_row + np.arange(k * (1 if patch.output_rows is None else 2))
        to.rows[first_row : first_row + k].copy_(patch.rows, non_blocking=True)
        if patch.output_rows is not None:
            to.rows[first_row + k : first_row + 2 * k].copy_(patch.output_rows, non_blocking=True)
        entries = bucket_entries(ids, taken[:k], buckets, positions)
        to.entries[first_bucket : first_bucket + buckets].copy_(torch.from_numpy(entries))
        start = 1 + first_row
        if patch.output:
            to.outputs[start : start + k].copy_(torch.from_numpy((ids << 32) | taken[-k:]))
            self._changes_head.add(slot)
        else:
            self._changes_head.discard(slot)
        to.table[slot].copy_(torch.tensor([first_bucket, buckets - 1, multiplier, start, k if patch.output else 0]))

    def clear(self, slot: int) -> None:
        """Empty a slot: it answers as the base."""
        self.tensors.table[slot] = 0
        self._changes_head.discard(slot)
