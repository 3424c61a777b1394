"""A bank that grows: the rows of any number of patches on one device.

A slot's content never changes while it is in use: `replace` fills another slot, and what a slot held is given up
when its last user has let go. The tensors are published together, as one `BankTensors`. So a reader sees one content
from beginning to end, without a lock on the way.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ksl_patch.bank.tables import EMPTY, LOW, WIDTH, BankTensors, SlotRows, bucket_entries, check_rows, hash_ids
from ksl_patch.errors import BankError

# Spare room that a full tensor grows by: a sixteenth. Copying stays cheap and little memory lies idle.
_SPARE = 16


class _Room(NamedTuple):
    """Lines of each tensor: what a slot takes (rows, a run of buckets, a run of the head's entries), or their sizes."""

    rows: int
    buckets: int
    outputs: int

    def plus(self, other: _Room, times: int = 1) -> _Room:
        return _Room(*(a + times * b for a, b in zip(self, other, strict=True)))

    def within(self, limit: _Room) -> bool:
        return all(a <= b for a, b in zip(self, limit, strict=True))


@dataclass(eq=False)
class _Slot:
    """The host's side of a slot. `host` holds the rows of a slot that was evicted; else they are in the bank."""

    token_ids: np.ndarray
    output: bool
    separate: bool
    prompt_only: bool
    hashed: tuple[int, int, np.ndarray]
    room: _Room
    bank_rows: np.ndarray | None = None
    buckets: int = 0
    outputs: int = 0
    host: torch.Tensor | None = None
    holds: int = 0
    retired: bool = False
    events: list[torch.cuda.Event] = field(default_factory=list)

    def line(self, buckets: int, outputs: int) -> np.ndarray:
        """The slot's line of the table, for runs that begin there."""
        buckets_count, multiplier, _ = self.hashed
        return np.array([buckets, buckets_count - 1, multiplier, outputs, len(self.token_ids) if self.output else 0])


class _Runs:
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


class _Gone:
    """What is free once some slots have gone."""

    def __init__(self) -> None:
        self.room, self.buckets, self.outputs = _Room(0, 0, 0), set[int](), set[int]()

    def add(self, room: _Room) -> None:
        self.room = self.room.plus(room)
        self.buckets.add(room.buckets)
        self.outputs.add(room.outputs)


class PatchBank:
    """Rows of many patches on one device, found by (slot, token id) in one step however many there are.

    vocab_size, hidden_size, dtype, device: of the base's table.
    capacity: bank rows to reserve at once. Growing makes new tensors, which a captured CUDA graph does not see and
        compiled code is compiled again for; reserve what they will need (`generation` counts the changes).
    output_width: rows of a patch to reserve for in the head, where patches of side "input+output" are to come.
    budget: bytes that rows and entries may take on the device, the directory of 40 bytes a slot not counted, nor the
        second copy that there is for a moment while tensors grow or are compacted; None for no limit.
    evict: with a budget, move the least recently used patches to (pinned) host memory instead of failing; they
        come back when they are used.
    tensors: what a reader takes, once for each step.

    On CUDA all writes are on one stream of the bank's own. `hold` makes the reader's stream wait for them, and what
    held a slot is waited for before its rows are written again. Raises BankError when the capacity exceeds the budget.
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
        self._depth = 0
        self._released: collections.deque[tuple[list[int], Any]] = collections.deque()  # holds that have ended
        self._slots: dict[int, _Slot] = {}
        self._idle: dict[int, None] = {}  # on the device and held by nobody, the least recently used first
        self._free_slots: list[int] = []
        self._used_slots = 1
        self._buckets, self._outputs = _Runs(), _Runs()
        self._taken = _Room(0, 1, 1)  # by all that is on the device, and the first lines
        self._reserved_width = output_width
        self._fixed_width: int | None = None
        self._widths: dict[int, int] = {}  # how many loaded patches change so many of the head's rows
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: torch.cuda.Event | None = None
        self._readers: set[torch.cuda.Stream] = set()
        if evict and budget is None:
            raise BankError("evict=True moves patches out of a budget: give one, budget=BYTES.")
        heads = capacity // output_width if output_width else 0
        sizes = _Room(max(1, capacity), 1 + capacity // 2, 1 + heads * _run_length(output_width))
        if capacity and not self._affords(sizes):
            raise BankError(
                f"a capacity of {capacity:,} rows takes {self._counted(sizes):,} bytes, more than the budget of "
                f"{budget:,}: reserve less, or raise the budget."
            )
        self.tensors = self._fresh(sizes, 1 + capacity // 8)
        self._free_rows = list(reversed(range(sizes.rows)))

    def __len__(self) -> int:
        """Patches in the bank, evicted ones included."""
        with self._exclusive():
            return sum(not slot.retired for slot in self._slots.values())

    @property
    def nbytes(self) -> int:
        """Bytes on the device, spare room included."""
        return self.tensors.nbytes

    @property
    def output_width(self) -> int:
        """The most rows of the head that one slot changes that is there or held, or that were reserved."""
        if self._fixed_width is not None:
            return self._fixed_width
        return max(self._reserved_width, *self._widths, 0)

    def width_of(self, slots: Iterable[int]) -> int:
        """The most rows of the head that one of these slots changes."""
        with self._exclusive():
            entries = [self._entry(slot) for slot in slots if slot]
        return max((len(entry.token_ids) for entry in entries if entry.output), default=0)

    def fix(self) -> None:
        """Keep the tensors where they are from now on, since a CUDA graph has captured them."""
        with self._exclusive():
            self._fixed_width = self.output_width

    def add(self, patch: SlotRows) -> int:
        """Put a patch into a free slot. Raises BankError when it does not fit the table or the budget."""
        slot, rows = self._prepare(patch)
        with self._exclusive():
            return self._add(slot, rows)

    def remove(self, slot: int) -> None:
        """Give a slot up, now or when its last user has let go. Raises BankError for an empty slot."""
        with self._exclusive():
            entry = self._entry(slot)
            entry.retired = True
            if not entry.holds:
                self._clear(slot)

    def replace(self, slot: int, patch: SlotRows) -> int:
        """Put new content in the place of a slot's and return its slot, another one.

        Whoever holds the old slot keeps the old rows to the end; nobody sees a mix. Raises BankError, and leaves the
        old content, where the new one does not fit.
        """
        new, rows = self._prepare(patch)
        with self._exclusive():
            old = self._entry(slot)
            if old.holds or old.host is not None or self._fits(new.room):
                number = self._add(new, rows)
                self.remove(slot)
                return number
            # The two do not fit beside each other: the new one gets the room of the old one.
            self._to_go(new.room, slot)
            kept = self._to_host(slot, old)
            try:
                number = self._add(new, rows)
            except BaseException:
                self._place(slot, old, kept)
                self._idle[slot] = None
                old.host = None
                raise
            self.remove(slot)
            return number

    @contextmanager
    def hold(self, slots: Iterable[int], stream: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Keep the contents of slots, and keep them on the device, for the length of a `with` block.

        stream: gives the CUDA stream that reads them, or None for the current one, at each end of the block.
        Evicted slots come back first. Raises BankError for an empty slot, or when the held slots exceed the budget.
        """
        held = sorted({slot for slot in slots if slot})
        taken: list[int] = []
        try:
            with self._exclusive():
                for number in held:
                    entry = self._entry(number)
                    entry.holds += 1
                    taken.append(number)
                    self._idle.pop(number, None)
                away = [number for number in held if self._slots[number].host is not None]
                if len(away) > 1:
                    self._check_together(away)
                for number in away:
                    entry = self._slots[number]
                    assert entry.host is not None
                    self._place(number, entry, entry.host)
                    entry.host = None
            self.wait_for_writes(stream())
            yield
        finally:
            self._release_hold(taken, stream)

    def wait_for_writes(self, stream: Any = None) -> None:
        """On CUDA, let a stream (the current one by default) wait for all that was written; it reads from then on."""
        if self._stream is None:
            return
        reader = stream or torch.cuda.current_stream(self.device)
        with self._exclusive():
            self._readers.add(reader)
            if self._ready is not None:
                reader.wait_event(self._ready)

    def is_prompt_only(self, slot: int) -> bool:
        """Whether a slot's rows act on the prompt alone."""
        return slot != 0 and self._entry(slot).prompt_only

    def contents(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A held slot's token ids int64 [k], rows [k, d], and the head's rows: None, the same tensor, or others."""
        with self._exclusive():
            entry = self._entry(slot)
            if entry.bank_rows is None:
                raise BankError(f"slot {slot} was evicted: hold it to bring it back.")
            both = self.tensors.rows[self._to_device(entry.bank_rows)]
        k = len(entry.token_ids)
        rows, head_rows = both[:k], both[k:]
        if not entry.separate:
            head_rows = rows
        return self._to_device(entry.token_ids), rows, head_rows if entry.output else None

    # The end of a hold may come from a finaliser, at any point of any thread, also in the middle of what is below. So
    # it is only noted, and done between two changes, without waiting for anybody.

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """A `with` block in which this thread alone changes the bank."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._settle()
                yield
            finally:
                try:
                    if self._depth == 1:
                        self._settle()
                finally:
                    self._depth -= 1

    def _release_hold(self, taken: list[int], stream: Callable[[], Any]) -> None:
        if not taken:
            return
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream() or torch.cuda.current_stream(self.device))
        self._released.append((taken, event))
        if self._lock.acquire(blocking=False):
            try:
                if self._depth == 0:
                    with self._exclusive():
                        pass
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Do what the holds that have ended leave to do."""
        while self._released:
            taken, event = self._released.popleft()
            for number in taken:
                entry = self._slots[number]
                entry.holds -= 1
                if event is not None:
                    entry.events = [event, *(e for e in entry.events if not e.query())]  # type: ignore[no-untyped-call]
                if entry.holds:
                    continue
                if entry.retired:
                    self._clear(number)
                elif entry.host is None:
                    self._idle[number] = None

    # Everything below runs on the host, in `_exclusive`. A writer fills rows, then entries, then the table, so that
    # what a reader finds is always there.

    def _entry(self, number: int) -> _Slot:
        entry = self._slots.get(number)
        if entry is None or (entry.retired and not entry.holds):
            raise BankError(f"slot {number} of the bank is empty.")
        return entry

    def _prepare(self, patch: SlotRows) -> tuple[_Slot, torch.Tensor]:
        check_rows(patch, self.vocab_size, self.hidden_size)
        ids, rows = patch.token_ids.cpu().numpy(), patch.rows.detach()
        if patch.output_rows is not None:
            rows = torch.cat([rows, patch.output_rows.detach().to(rows)])
        hashed = hash_ids(ids)
        room = _Room(len(rows), hashed[0], _run_length(len(ids)) if patch.output else 0)
        return _Slot(ids, patch.output, patch.output_rows is not None, patch.prompt_only, hashed, room), rows

    def _add(self, slot: _Slot, rows: torch.Tensor) -> int:
        if slot.output and self._fixed_width is not None and len(slot.token_ids) > self._fixed_width:
            raise BankError(
                f"the patch changes {len(slot.token_ids)} rows of the head, and the CUDA graph that was captured "
                f"has room for {self._fixed_width}: reserve them with output_width before it is captured."
            )
        number = self._free_slots[-1] if self._free_slots else self._used_slots
        self._place(number, slot, rows)
        if number == self._used_slots:
            self._used_slots += 1
        else:
            self._free_slots.pop()
        self._slots[number], self._idle[number] = slot, None
        if slot.output:
            self._count_width(slot, 1)
        return number

    def _count_width(self, slot: _Slot, by: int) -> None:
        k = len(slot.token_ids)
        count = self._widths.get(k, 0) + by
        if count:
            self._widths[k] = count
        else:
            del self._widths[k]

    def _place(self, number: int, slot: _Slot, rows: torch.Tensor) -> None:
        """Write a slot's rows and entries, and make them visible last."""
        room, k = slot.room, len(slot.token_ids)
        positions = slot.hashed[2]
        self._make_room(room, number)
        taken = np.array([self._free_rows.pop() for _ in range(room.rows)])
        start, outputs = self._buckets.take(room.buckets), self._outputs.take(room.outputs)
        try:
            with self._writing(rows):
                to = self.tensors
                to.rows.index_copy_(0, self._to_device(taken), rows.to(self.device, self.dtype))
                entries = bucket_entries(slot.token_ids, taken[:k], room.buckets, positions)
                to.entries[start : start + room.buckets] = self._to_device(entries)
                if slot.output:
                    to.outputs[outputs : outputs + k] = self._to_device((slot.token_ids << 32) | taken[-k:])
                to.table[number] = self._to_device(slot.line(start, outputs))
        except BaseException:
            self._give_back(room, taken, start, outputs)
            raise
        slot.bank_rows, slot.buckets, slot.outputs = taken, start, outputs
        self._taken = self._taken.plus(room)

    def _give_back(self, room: _Room, rows: np.ndarray, buckets: int, outputs: int) -> None:
        self._free_rows.extend(reversed(rows.tolist()))
        self._buckets.give(buckets, room.buckets)
        self._outputs.give(outputs, room.outputs)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    # Room

    @property
    def _sizes(self) -> _Room:
        return _Room(len(self.tensors.rows), len(self.tensors.entries), len(self.tensors.outputs))

    def _counted(self, sizes: _Room) -> int:
        """The bytes of tensors of these sizes that count against the budget."""
        return sizes.rows * self.hidden_size * self.dtype.itemsize + 8 * (WIDTH * sizes.buckets + sizes.outputs)

    def _affords(self, sizes: _Room) -> bool:
        return self.budget is None or self._counted(sizes) <= self.budget

    def _wanted(self, room: _Room, gone: _Gone | None = None) -> _Room:
        """The sizes that the tensors must have for a slot of this room, where all stays in its place but what goes."""
        gone = gone or _Gone()
        missing = max(0, room.rows - len(self._free_rows) - gone.room.rows)
        return _Room(
            len(self.tensors.rows) + missing,
            self._buckets.end(room.buckets, gone.buckets),
            self._outputs.end(room.outputs, gone.outputs),
        )

    def _fits(self, room: _Room, gone: _Gone | None = None) -> bool:
        """Whether a slot of this room fits once others have gone: as the tensors are, grown, or compacted."""
        if self.budget is None and self._fixed_width is None:
            return True
        wanted = self._wanted(room, gone)
        if self._fixed_width is not None:
            return wanted.within(self._sizes)
        if self._affords(_larger(wanted, self._sizes)):
            return True
        return self._affords(self._taken.plus(room).plus(gone.room if gone else _Room(0, 0, 0), -1))

    def _to_go(self, room: _Room, replaced: int | None = None) -> list[int]:
        """The least recently used slots that must go before a slot of this room fits. Raises BankError, if none can.

        replaced: a slot that goes first.
        """
        gone, going = _Gone(), []
        if replaced is not None:
            gone.add(self._slots[replaced].room)
        for number in self._idle if self.evict else ():
            if self._fits(room, gone):
                break
            if number != replaced:
                gone.add(self._slots[number].room)
                going.append(number)
        if self._fits(room, gone):
            return going
        if self._fixed_width is not None:
            raise BankError(
                f"the bank has no room for {room.rows} more rows, and its tensors cannot move since a CUDA graph has "
                "captured them: reserve more with capacity before it is captured."
            )
        held = sum(slot.holds > 0 for slot in self._slots.values())
        raise BankError(
            f"the bank's budget of {self.budget:,} bytes has no room for {room.rows} more rows beside "
            + (
                f"the {held} patches in use: raise the budget, or choose fewer at once."
                if self.evict
                else f"{len(self)} patches ({self.nbytes:,} bytes): remove some, raise the budget, or let it evict."
            )
        )

    def _check_together(self, numbers: list[int]) -> None:
        """Raise BankError unless several slots fit the budget at once, when all that is idle has gone."""
        if self.budget is None or self._fixed_width is not None:
            return
        need = self._taken
        for number in self._idle if self.evict else ():
            need = need.plus(self._slots[number].room, -1)
        for number in numbers:
            need = need.plus(self._slots[number].room)
        if not self._affords(need):
            raise BankError(
                f"the bank's budget of {self.budget:,} bytes has no room for the {len(numbers)} patches that are "
                "wanted at once: choose fewer in a batch, or raise the budget."
            )

    def _make_room(self, room: _Room, number: int) -> None:
        """Make room for a slot, and a line for it in the table. Raises BankError, with nothing changed."""
        slots = len(self.tensors.table)
        if number >= slots:
            if self._fixed_width is not None:
                raise BankError(
                    f"a CUDA graph has captured the bank, which has lines for {slots - 1} patches: reserve more."
                )
            slots = number + 1 + slots // _SPARE
        for oldest in self._to_go(room):
            self._to_host(oldest, self._slots[oldest])
        wanted, sizes = self._wanted(room), self._sizes
        if wanted.within(sizes):
            if slots > len(self.tensors.table):
                self._publish(self._grown(sizes, slots))
            return
        ample = _Room(*(w if w <= s else w + s // _SPARE for w, s in zip(wanted, sizes, strict=True)))
        for each in (_larger(ample, sizes), _larger(wanted, sizes)):
            if self._affords(each):
                self._publish(self._grown(each, slots))
                return
        # Compacting costs a copy of everything, so it is to last: an eighth of the budget is freed if patches may go.
        assert self.budget is not None
        while self.evict and self._idle and self._counted(self._taken.plus(room)) > self.budget - self.budget // 8:
            oldest = next(iter(self._idle))
            self._to_host(oldest, self._slots[oldest])
        least = self._taken.plus(room)
        spare = self.budget / self._counted(least)
        filled = _Room(*(int(lines * spare) for lines in least))
        self._compact(filled if self._affords(filled) else least, slots)

    def _grown(self, sizes: _Room, slots: int) -> BankTensors:
        old = self.tensors
        new = self._fresh(sizes, slots)
        with self._writing():
            for name in ("rows", "entries", "outputs", "table"):
                tensor = getattr(old, name)
                getattr(new, name)[: len(tensor)] = tensor
        self._free_rows[:0] = reversed(range(len(old.rows), sizes.rows))
        return new

    def _compact(self, sizes: _Room, slots: int) -> None:
        """Put the same contents into tensors of the least size, one slot's after the other's."""
        old, new = self.tensors, self._fresh(sizes, slots)
        present = {number: slot for number, slot in self._slots.items() if slot.bank_rows is not None}
        rows = np.concatenate([np.empty(0, np.int64), *map(_present, present.values())])
        moved = np.full(len(old.rows), -1)
        moved[rows] = np.arange(len(rows))
        where, buckets, outputs = self._to_device(moved), _Runs(), _Runs()
        places = {}
        with self._writing():
            new.rows[: len(rows)] = old.rows[self._to_device(rows)]
            for number, slot in present.items():
                room, k = slot.room, len(slot.token_ids)
                places[number] = start, first = buckets.take(room.buckets), outputs.take(room.outputs)
                found = old.entries[slot.buckets : slot.buckets + room.buckets]
                to = (found & ~LOW) | where[torch.where(found >= 0, found & LOW, 0)]
                new.entries[start : start + room.buckets] = torch.where(found >= 0, to, EMPTY)
                if slot.output:
                    found = old.outputs[slot.outputs : slot.outputs + k]
                    new.outputs[first : first + k] = (found & ~LOW) | where[found & LOW]
                new.table[number] = self._to_device(slot.line(start, first))
        self._publish(new)
        for number, slot in present.items():
            slot.buckets, slot.outputs = places[number]
            slot.bank_rows = moved[_present(slot)]
        self._buckets, self._outputs = buckets, outputs
        self._free_rows = list(reversed(range(len(rows), sizes.rows)))

    def _fresh(self, sizes: _Room, slots: int) -> BankTensors:
        with self._writing():
            return BankTensors.empty(
                sizes.rows, self.hidden_size, sizes.buckets, sizes.outputs, slots, self.dtype, self.device
            )

    def _publish(self, tensors: BankTensors) -> None:
        """Let readers see other tensors. Those who read the old ones may go on: they hold what they held."""
        old = self.tensors
        if self._stream is not None:
            self._stream.synchronize()  # a reader whose block is open waits for no event any more
            for stream in self._readers:
                for tensor in (old.rows, old.entries, old.outputs, old.table):
                    tensor.record_stream(stream)
        self.tensors = tensors
        self.generation += 1

    def _to_host(self, number: int, slot: _Slot) -> torch.Tensor:
        """Move a slot that nobody holds to the host; returns its rows there."""
        self._wait_for_readers(slot)
        with self._writing():
            rows = self.tensors.rows[self._to_device(_present(slot))].cpu()
        slot.host = rows.pin_memory() if self._stream is not None else rows
        self._release(number, slot)
        return slot.host

    def _clear(self, number: int) -> None:
        slot = self._slots.pop(number)
        self._wait_for_readers(slot)
        if slot.output:
            self._count_width(slot, -1)
        if slot.bank_rows is not None:
            self._release(number, slot)
        self._free_slots.append(number)

    def _release(self, number: int, slot: _Slot) -> None:
        """Make a slot find nothing, then give its rows and runs back."""
        rows, room = _present(slot), slot.room
        self._idle.pop(number, None)
        with self._writing():
            self.tensors.table[number] = 0
            self.tensors.entries[slot.buckets : slot.buckets + room.buckets] = EMPTY
        self._give_back(room, rows, slot.buckets, slot.outputs)
        self._taken = self._taken.plus(room, -1)
        slot.bank_rows, slot.buckets, slot.outputs = None, 0, 0

    # Streams: on a CPU these do nothing.

    @contextmanager
    def _writing(self, source: torch.Tensor | None = None) -> Iterator[None]:
        """A block of device writes, on the bank's own stream. source: a tensor that is read there."""
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            if source is not None and source.is_cuda:
                source.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                yield
                self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._ready.record(self._stream)

    def _wait_for_readers(self, slot: _Slot) -> None:
        for event in slot.events:
            event.wait(self._stream)
        slot.events = []


def _present(slot: _Slot) -> np.ndarray:
    assert slot.bank_rows is not None
    return slot.bank_rows


def _run_length(count: int) -> int:
    """Lines that are taken for so many: a power of two, so that a freed run suits others."""
    return 1 << (count - 1).bit_length()


def _larger(a: _Room, b: _Room) -> _Room:
    return _Room(*map(max, a, b))
