"""The bank: device tensors that hold the rows of every loaded patch, and the lookup (slot, token id) -> bank row.

A slot's content never changes while it is in use: `replace` fills another slot, and what a slot held is given up
when its last user has let go. So a reader sees one content from beginning to end, without a lock on the way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ksl_patch.errors import BankError

# A bucket of the hash table is one cache line: eight entries of (token id << 32 | bank row), -1 where empty.
_WIDTH = 8
LOW = 0xFFFFFFFF
_TENSORS = ("rows", "entries", "outputs", "table")
# Odd numbers of 31 bits, drawn once.
_MULTIPLIERS = [int(m) | 1 for m in np.random.default_rng(0).integers(1 << 30, 1 << 31, 16)]
# Spare room that a full tensor grows by: a sixteenth. Copying stays cheap and little memory lies idle.
_SPARE = 16


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


@dataclass(eq=False)
class _Slot:
    """The host's side of a slot. `host` holds the rows of a slot that was evicted; else they are in the bank."""

    token_ids: np.ndarray
    output: bool
    separate: bool
    prompt_only: bool
    bank_rows: np.ndarray | None = None
    buckets: tuple[int, int] = (0, 0)
    output_line: int = 0
    host: torch.Tensor | None = None
    holds: int = 0
    retired: bool = False
    events: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def row_count(self) -> int:
        return len(self.token_ids) * (2 if self.separate else 1)


class BankTensors:
    """What a reader of a bank sees: four device tensors, and the lookup (slot, token id) -> bank row.

    rows: [R, d]. entries: int64 [E, 8], buckets of (token id << 32 | bank row), -1 where empty, bucket 0 always.
    outputs: int64 [O, K], the same for the head's rows of the slots that change it, line 0 being nobody's.
    table: int64 [S, 4], a slot's first bucket, mask, multiplier and line of `outputs`; slot 0 is the base, and an
    empty slot finds nothing, as the base.
    """

    rows: torch.Tensor
    entries: torch.Tensor
    outputs: torch.Tensor
    table: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes on the device, spare room included."""
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def lookup(self, slots: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Bank row of each position, or -1 for the base's own row.

        slots: int64, broadcastable to token_ids' shape; token_ids: int64 or int32. Returns int64 of that shape.
        One bucket is read for each position: multiply-shift hashing, with a multiplier that keeps a slot's
        buckets from overflowing (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair
        problem", 1997).
        """
        first, mask, multiplier, _ = self.table[slots].unbind(-1)
        token_ids = token_ids.long()
        bucket = first + (((token_ids * multiplier) >> 16) & mask)
        found = self.entries[bucket]  # [..., 8]
        match = (found >> 32) == token_ids.unsqueeze(-1)
        return torch.where(match, found & LOW, -1).amax(dim=-1)


class PatchBank(BankTensors):
    """Rows of many patches on one device, found by (slot, token id) in one step however many there are.

    vocab_size, hidden_size, dtype, device: of the base's table.
    capacity: bank rows to reserve at once. Growing makes new tensors, which a captured CUDA graph does not see and
        compiled code is compiled again for; reserve what they will need (`generation` counts the growths).
    output_width: rows of a patch to reserve for in the head, where patches of side "input+output" are to come.
    budget: bytes that rows and entries may take on the device, the directory of 32 bytes a slot not counted; None
        for no limit.
    evict: with a budget, move the least recently used patches to (pinned) host memory instead of failing; they
        come back when they are used.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int = 0,
        output_width: int = 0,
        budget: int | None = None,
        evict: bool = False,
    ) -> None:
        self.vocab_size, self.hidden_size, self.dtype = vocab_size, hidden_size, dtype
        self.device = torch.device(device)
        self.budget, self.evict = budget, evict
        self.generation = 0
        self._lock = threading.RLock()
        self._slots: dict[int, _Slot] = {}  # in the order of their last use
        self._free_slots: list[int] = []
        self._free_rows: list[int] = []
        # Free runs of buckets by their length, a power of two; a run is only ever used for its own length again.
        self._free_buckets: dict[int, list[int]] = {}
        self._free_outputs: list[int] = []
        self._used_buckets = 1  # bucket 0 stays empty: the base's
        self._used_slots = self._used_outputs = 1
        with torch.inference_mode(False):
            self.rows = torch.zeros(max(1, capacity), hidden_size, dtype=dtype, device=self.device)
            self.entries = torch.full((1 + capacity // 2, _WIDTH), -1, device=self.device)
            lines = 1 + (capacity // output_width if output_width else 0)
            self.outputs = torch.full((lines, output_width), -1, device=self.device)
            self.table = torch.zeros(1 + capacity // 8, 4, dtype=torch.int64, device=self.device)
        self._free_rows.extend(reversed(range(max(1, capacity))))

    def __len__(self) -> int:
        """Patches in the bank, evicted ones included."""
        return sum(not slot.retired for slot in self._slots.values())

    @property
    def output_width(self) -> int:
        """The most rows of the head that one slot changes."""
        return int(self.outputs.shape[1])

    def add(self, patch: SlotRows) -> int:
        """Put a patch into a free slot. Raises BankError when it does not fit the table or the budget."""
        _check_rows(patch, self.vocab_size, self.hidden_size)
        ids = patch.token_ids.cpu().numpy()
        rows = patch.rows.detach()
        if patch.output_rows is not None:
            rows = torch.cat([rows, patch.output_rows.detach().to(rows)])
        with self._lock:
            slot = _Slot(ids, patch.output, patch.output_rows is not None, patch.prompt_only)
            number = self._free_slots[-1] if self._free_slots else self._used_slots
            self._place(number, slot, rows)
            if self._free_slots:
                self._free_slots.pop()
            else:
                self._used_slots += 1
            self._slots[number] = slot
            return number

    def remove(self, slot: int) -> None:
        """Give a slot up, now or when its last user has let go. Raises BankError for an empty slot."""
        with self._lock:
            entry = self._entry(slot)
            entry.retired = True
            if not entry.holds:
                self._clear(slot)

    def replace(self, slot: int, patch: SlotRows) -> int:
        """Put new content in the place of a slot's and return its slot, another one.

        Whoever holds the old slot keeps the old rows to the end; nobody sees a mix.
        """
        with self._lock:
            self._entry(slot)
            new = self.add(patch)
            self.remove(slot)
            return new

    @contextmanager
    def hold(self, slots: Iterable[int]) -> Iterator[None]:
        """Keep the contents of slots, and keep them on the device, for the length of a `with` block.

        Evicted slots come back first. Raises BankError for an empty slot, or when the held slots exceed the budget.
        """
        held = sorted({slot for slot in slots if slot})
        taken: list[int] = []
        try:
            with self._lock:
                for number in held:
                    entry = self._entry(number)
                    entry.holds += 1
                    taken.append(number)
                    self._slots[number] = self._slots.pop(number)  # now the most recently used
                for number in held:
                    entry = self._slots[number]
                    if entry.host is not None:
                        self._place(number, entry, entry.host)
                        entry.host = None
            yield
        finally:
            with self._lock:
                for number in taken:
                    entry = self._slots[number]
                    entry.holds -= 1
                    if self.device.type == "cuda":
                        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                        event.record(torch.cuda.current_stream(self.device))
                        entry.events = [event, *(e for e in entry.events if not e.query())]  # type: ignore[no-untyped-call]
                    if entry.retired and not entry.holds:
                        self._clear(number)

    def is_prompt_only(self, slot: int) -> bool:
        """Whether a slot's rows act on the prompt alone."""
        return slot != 0 and self._entry(slot).prompt_only

    def contents(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A held slot's token ids int64 [k], rows [k, d], and the head's rows: None, the same tensor, or others."""
        entry = self._entry(slot)
        if entry.bank_rows is None:
            raise BankError(f"slot {slot} was evicted: hold it to bring it back.")
        k = len(entry.token_ids)
        both = self.rows[self._to_device(entry.bank_rows)]
        rows, head_rows = both[:k], both[k:]
        if not entry.separate:
            head_rows = rows
        return self._to_device(entry.token_ids), rows, head_rows if entry.output else None

    # Everything below runs on the host, under the lock. A reader takes table, then entries, then rows; a writer
    # fills them the other way round, so that what a reader finds is always there.

    def _entry(self, number: int) -> _Slot:
        entry = self._slots.get(number)
        if entry is None or (entry.retired and not entry.holds):
            raise BankError(f"slot {number} of the bank is empty.")
        return entry

    def _place(self, number: int, slot: _Slot, rows: torch.Tensor) -> None:
        """Write a slot's rows and entries, and make them visible last."""
        buckets, multiplier, positions = _hash(slot.token_ids)
        need_width = len(slot.token_ids) if slot.output else 0
        while not self._reserve(slot.row_count, buckets, number, need_width):
            if not (self.evict and self._evict_one()):
                raise BankError(
                    f"the bank's budget of {self.budget:,} bytes has no room for {slot.row_count} more rows beside "
                    f"{len(self)} patches ({self.nbytes:,} bytes): remove some, raise the budget, or let it evict."
                )
        taken = np.array([self._free_rows.pop() for _ in range(slot.row_count)])
        free = self._free_buckets.get(buckets)
        if free:
            start = free.pop()
        else:
            start, self._used_buckets = self._used_buckets, self._used_buckets + buckets
        k = len(slot.token_ids)
        with torch.inference_mode(False), torch.no_grad():
            self.rows.index_copy_(0, self._to_device(taken), rows.to(self.device, self.dtype))
            entries = np.full((buckets, _WIDTH), -1, dtype=np.int64)
            entries.reshape(-1)[positions] = (slot.token_ids << 32) | taken[:k]
            self.entries[start : start + buckets] = self._to_device(entries)
            if slot.output:
                slot.output_line = self._place_output(slot.token_ids, taken[-k:])
            self.table[number] = self._to_device(np.array([start, buckets - 1, multiplier, slot.output_line]))
        slot.bank_rows, slot.buckets = taken, (start, buckets)

    def _place_output(self, token_ids: np.ndarray, rows: np.ndarray) -> int:
        line = self._free_outputs.pop() if self._free_outputs else self._used_outputs
        self._used_outputs = max(self._used_outputs, line + 1)
        self.outputs[line] = self._to_device(_line(token_ids, rows, self.output_width))
        return line

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _reserve(self, rows: int, buckets: int, number: int, width: int) -> bool:
        """Make room, growing tensors where it is needed; False when the budget does not allow it."""
        have_bucket = bool(self._free_buckets.get(buckets))
        outputs = self._used_outputs + (1 if width and not self._free_outputs else 0)
        width = max(width, self.output_width)
        want = {
            "rows": (len(self.rows) + max(0, rows - len(self._free_rows)), self.hidden_size),
            "entries": (self._used_buckets + (0 if have_bucket else buckets), _WIDTH),
            "outputs": (outputs, width),
            "table": (number + 1, 4),
        }
        grow = {name: shape for name, shape in want.items() if self._too_small(getattr(self, name), shape)}
        if not grow:
            return True
        for spare in (_SPARE, 0):
            shapes = {
                name: (shape[0] + (len(getattr(self, name)) // spare if spare else 0), shape[1])
                for name, shape in grow.items()
            }
            after = sum(
                math.prod(shapes.get(name, tensor.shape)) * tensor.itemsize
                for name, tensor in ((name, getattr(self, name)) for name in _TENSORS if name != "table")
            )
            if self.budget is None or after <= self.budget:
                for name, shape in shapes.items():
                    self._grow(name, shape)
                self.generation += 1
                return True
        return False

    @staticmethod
    def _too_small(tensor: torch.Tensor, shape: tuple[int, int]) -> bool:
        return tensor.shape[0] < shape[0] or tensor.shape[1] < shape[1]

    def _grow(self, name: str, shape: tuple[int, int]) -> None:
        old = getattr(self, name)
        with torch.inference_mode(False), torch.no_grad():
            new = torch.full(shape, -1 if name in ("entries", "outputs") else 0, dtype=old.dtype, device=old.device)
            new[: old.shape[0], : old.shape[1]] = old
            if name == "outputs" and old.shape[1]:
                new[: old.shape[0], old.shape[1] :] = old[:, :1]  # as `_place_output` pads
        if name == "rows":
            self._free_rows[:0] = reversed(range(old.shape[0], shape[0]))
        setattr(self, name, new)

    def _evict_one(self) -> bool:
        """Move the least recently used slot that nobody holds to the host."""
        for number, slot in self._slots.items():
            if slot.holds or slot.bank_rows is None:
                continue
            self._wait(slot)
            rows = self.rows[self._to_device(slot.bank_rows)].cpu()
            slot.host = rows.pin_memory() if self.device.type == "cuda" else rows
            self._release(number, slot)
            return True
        return False

    def _clear(self, number: int) -> None:
        slot = self._slots.pop(number)
        self._wait(slot)
        if slot.bank_rows is not None:
            self._release(number, slot)
        self._free_slots.append(number)

    def _wait(self, slot: _Slot) -> None:
        """On CUDA, let the writes that follow wait for what still reads the slot."""
        for event in slot.events:
            event.wait(torch.cuda.current_stream(self.device))
        slot.events = []

    def _release(self, number: int, slot: _Slot) -> None:
        """Make a slot find nothing, then give its rows and buckets back."""
        assert slot.bank_rows is not None
        start, buckets = slot.buckets
        with torch.inference_mode(False), torch.no_grad():
            self.table[number] = 0
            self.entries[start : start + buckets] = -1
        self._free_rows.extend(reversed(slot.bank_rows.tolist()))
        self._free_buckets.setdefault(buckets, []).append(start)
        if slot.output_line:
            self._free_outputs.append(slot.output_line)
        slot.bank_rows, slot.buckets, slot.output_line = None, (0, 0), 0


class SlotBank(BankTensors):
    """A bank of a fixed shape for a runtime that numbers the slots itself, as vLLM does: nothing ever grows.

    slots: how many beside the base. max_rows: what one of them has room for, the head's own rows included.
    So whatever fits by itself fits whatever else is there, and CUDA graphs and compiled code stay right.
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
        self._buckets = 2 * _fewest_buckets(max_rows)
        self.rows = torch.zeros(slots * max_rows, hidden_size, dtype=dtype, device=device)
        self.entries = torch.full((1 + slots * self._buckets, _WIDTH), -1, device=device)
        self.outputs = torch.full((1 + slots, max_rows), -1, device=device)
        self.table = torch.zeros(1 + slots, 4, dtype=torch.int64, device=device)
        self._changes_head: set[int] = set()

    @property
    def changes_head(self) -> bool:
        """Whether any slot changes the head's rows."""
        return bool(self._changes_head)

    def check(self, patch: SlotRows) -> None:
        """Raise BankError unless `write` would take the patch."""
        self._fit(patch)

    def _fit(self, patch: SlotRows) -> tuple[int, int, np.ndarray]:
        """The patch's `_hash`, once it is known to fit."""
        _check_rows(patch, self.vocab_size, self.hidden_size)
        count = len(patch.token_ids) * (1 if patch.output_rows is None else 2)
        if count > self.max_rows:
            raise BankError(f"the patch has {count} rows, and a slot has room for {self.max_rows}: reserve more.")
        if patch.prompt_only:
            raise BankError("the patch acts on the prompt only, which a bank of this kind cannot do.")
        hashed = _hash(patch.token_ids.cpu().numpy())
        if hashed[0] > self._buckets:
            raise BankError("the patch's token ids do not fit the bank's hash table: reserve more rows a slot.")
        return hashed

    def write(self, slot: int, patch: SlotRows) -> None:
        """Give a slot, 1 to `slots`, new content. Raises BankError as `check` does."""
        buckets, multiplier, positions = self._fit(patch)
        ids = patch.token_ids.cpu().numpy()
        first_row, first_bucket = (slot - 1) * self.max_rows, 1 + (slot - 1) * self._buckets
        k = len(ids)
        taken = first_row + np.arange(k * (1 if patch.output_rows is None else 2))
        entries = np.full((buckets, _WIDTH), -1, dtype=np.int64)
        entries.reshape(-1)[positions] = (ids << 32) | taken[:k]
        self.rows[first_row : first_row + k].copy_(patch.rows, non_blocking=True)
        if patch.output_rows is not None:
            self.rows[first_row + k : first_row + 2 * k].copy_(patch.output_rows, non_blocking=True)
        self.entries[first_bucket : first_bucket + buckets].copy_(torch.from_numpy(entries))
        if patch.output:
            self.outputs[slot].copy_(torch.from_numpy(_line(ids, taken[-k:], self.max_rows)))
            self._changes_head.add(slot)
        else:
            self._changes_head.discard(slot)
        line = slot if patch.output else 0
        self.table[slot].copy_(torch.tensor([first_bucket, buckets - 1, multiplier, line]))

    def clear(self, slot: int) -> None:
        """Empty a slot: it answers as the base."""
        self.table[slot] = 0
        self._changes_head.discard(slot)


def _line(token_ids: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
    """A line of `outputs`. What is over repeats the first entry: the same value is written twice."""
    entries = (token_ids << 32) | rows
    return np.concatenate([entries, np.repeat(entries[:1], width - len(entries))])


def _check_rows(patch: SlotRows, vocab_size: int, hidden_size: int) -> None:
    ids = patch.token_ids.cpu().numpy()
    if not ids.size or ids.min() < 0 or ids.max() >= vocab_size or not np.diff(np.sort(ids)).all():
        raise BankError(f"the patch's token ids must be different, from 0 to {vocab_size - 1}, and at least one.")
    for rows in (patch.rows, patch.output_rows):
        if rows is not None and tuple(rows.shape) != (len(ids), hidden_size):
            raise BankError(
                f"rows of shape {list(rows.shape)} do not fit {len(ids)} token ids of a table with "
                f"{hidden_size} values a row."
            )


def _fewest_buckets(count: int) -> int:
    return 1 << max(0, math.ceil(math.log2(count / 3)))


def _hash(token_ids: np.ndarray) -> tuple[int, int, np.ndarray]:
    """A table for a set of ids: number of buckets, multiplier, and each id's place in the buckets, int64 [k]."""
    buckets = _fewest_buckets(len(token_ids))
    while True:
        for multiplier in _MULTIPLIERS:
            bucket = ((token_ids * multiplier) >> 16) & (buckets - 1)
            if np.bincount(bucket, minlength=buckets).max() <= _WIDTH:
                order = np.argsort(bucket, kind="stable")
                ordered = bucket[order]
                # The place inside a bucket: how many of the ids before it in order are in the same bucket.
                place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
                positions = np.empty(len(order), dtype=np.int64)
                positions[order] = ordered * _WIDTH + place
                return buckets, multiplier, positions
        buckets *= 2
