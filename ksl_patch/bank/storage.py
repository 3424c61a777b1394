"""The tensors of a growing bank: write, grow, compact, copy to the host; whose turn it is, eviction.py says.

A writer fills rows, then entries, then the table, so that what a reader finds is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ksl_patch.bank.lookup import EMPTY, LOW, WIDTH, BankTensors, bucket_entries
from ksl_patch.bank.slots import NOTHING, Gone, Room, Runs, Slot, run_length
from ksl_patch.errors import BankError

# Spare room that a full tensor grows by: a sixteenth. Copying stays cheap and little memory lies idle.
SPARE = 16


class Storage:
    """Tensors that slots are placed in.

    tensors: the ones that readers see now. generation: how often these were others. taken: by all that is in them, and
    the first lines, which are nobody's. fixed: whether they must stay where they are.

    On CUDA all writes are on one stream of its own. Raises BankError when the capacity exceeds the budget.
    """

    def __init__(
        self,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity: int,
        output_width: int,
        budget: int | None,
    ) -> None:
        self._hidden_size, self._dtype, self._device, self.budget = hidden_size, dtype, device, budget
        self.generation = 0
        self.fixed = False
        self.taken = Room(0, 1, 1)
        self._placed: dict[int, Slot] = {}
        self._buckets, self._outputs = Runs(), Runs()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: torch.cuda.Event | None = None
        self._readers: set[torch.cuda.Stream] = set()
        heads = capacity // output_width if output_width else 0
        sizes = Room(max(1, capacity), 1 + capacity // 2, 1 + heads * run_length(output_width))
        if capacity and not self.affords(sizes):
            raise BankError(
                f"a capacity of {capacity:,} rows takes {self.nbytes_of(sizes):,} bytes, more than the budget of "
                f"{budget:,}: reserve less, or raise the budget."
            )
        self.tensors = self._fresh(sizes, 1 + capacity // 8)
        self.free_rows = list(reversed(range(sizes.rows)))

    # Room

    @property
    def sizes(self) -> Room:
        """The sizes of the tensors."""
        return Room(len(self.tensors.rows), len(self.tensors.entries), len(self.tensors.outputs))

    def nbytes_of(self, sizes: Room) -> int:
        """The bytes of tensors of these sizes that count against the budget."""
        return sizes.rows * self._hidden_size * self._dtype.itemsize + 8 * (WIDTH * sizes.buckets + sizes.outputs)

    def affords(self, sizes: Room) -> bool:
        """Whether the budget has tensors of these sizes."""
        return self.budget is None or self.nbytes_of(sizes) <= self.budget

    def _wanted(self, room: Room, gone: Gone | None = None) -> Room:
        """The sizes that the tensors must have for a slot of this room, where all stays in its place but what goes."""
        gone = gone or Gone()
        missing = max(0, room.rows - len(self.free_rows) - gone.room.rows)
        return Room(
            len(self.tensors.rows) + missing,
            self._buckets.end(room.buckets, gone.buckets),
            self._outputs.end(room.outputs, gone.outputs),
        )

    def fits(self, room: Room, gone: Gone | None = None) -> bool:
        """Whether a slot of this room fits once others have gone: as the tensors are, grown, or compacted."""
        if self.budget is None and not self.fixed:
            return True
        wanted = self._wanted(room, gone)
        if self.fixed:
            return wanted.within(self.sizes)
        if self.affords(wanted.or_more(self.sizes)):
            return True
        return self.affords(self.taken.plus(room).plus(gone.room if gone else NOTHING, -1))

    def make_room(self, room: Room, slots: int, put_aside: Callable[[], bool]) -> None:
        """Have free lines for a slot of this room, which `fits`, and lines for so many slots in the table.

        put_aside: takes the slot that may go first out, and says whether there was one.
        """
        wanted, sizes = self._wanted(room), self.sizes
        if wanted.within(sizes):
            if slots > len(self.tensors.table):
                self._publish(self._grown(sizes, slots))
            return
        ample = Room(*(w if w <= s else w + s // SPARE for w, s in zip(wanted, sizes, strict=True)))
        for each in (ample.or_more(sizes), wanted.or_more(sizes)):
            if self.affords(each):
                self._publish(self._grown(each, slots))
                return
        # Compacting costs a copy of everything, so it is to last: an eighth of the budget is freed if patches may go.
        assert self.budget is not None
        while self.nbytes_of(self.taken.plus(room)) > self.budget - self.budget // 8 and put_aside():
            pass
        least = self.taken.plus(room)
        spare = self.budget / self.nbytes_of(least)
        filled = Room(*(int(lines * spare) for lines in least))
        self._compact(filled if self.affords(filled) else least, slots)

    # Slots

    def place(self, number: int, slot: Slot, rows: torch.Tensor) -> None:
        """Write a slot's rows and entries, for which there is room, and make them visible last."""
        room, k = slot.room, len(slot.token_ids)
        taken = np.array([self.free_rows.pop() for _ in range(room.rows)])
        start, outputs = self._buckets.take(room.buckets), self._outputs.take(room.outputs)
        try:
            with self._writing(rows):
                to = self.tensors
                to.rows.index_copy_(0, self._to_device(taken), rows.to(self._device, self._dtype))
                entries = bucket_entries(slot.token_ids, taken[:k], room.buckets, slot.hashed[2])
                to.entries[start : start + room.buckets] = self._to_device(entries)
                if slot.output:
                    to.outputs[outputs : outputs + k] = self._to_device((slot.token_ids << 32) | taken[-k:])
                to.table[number] = self._to_device(slot.line(start, outputs))
        except BaseException:
            self._give_back(room, taken, start, outputs)
            raise
        slot.bank_rows, slot.buckets, slot.outputs, slot.host = taken, start, outputs, None
        self._placed[number] = slot
        self.taken = self.taken.plus(room)

    def contents(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Token ids int64 [k], rows [k, d], and the head's rows: None, the same tensor, or others."""
        k, both = len(slot.token_ids), self.tensors.rows[self._to_device(slot.present)]
        rows = both[:k]
        head_rows = both[k:] if slot.separate else rows
        return self._to_device(slot.token_ids), rows, head_rows if slot.output else None

    def to_host(self, number: int, slot: Slot) -> None:
        """Move a slot that nobody holds to the host, in pinned memory beside CUDA; `place` brings it back."""
        self.wait_for_readers(slot)
        with self._writing():
            rows = self.tensors.rows[self._to_device(slot.present)].cpu()
        slot.host = rows.pin_memory() if self._stream is not None else rows
        self.release(number, slot)

    def release(self, number: int, slot: Slot) -> None:
        """Make a slot find nothing, then give its rows and runs back."""
        rows, room = slot.present, slot.room
        with self._writing():
            self.tensors.table[number] = 0
            self.tensors.entries[slot.buckets : slot.buckets + room.buckets] = EMPTY
        self._give_back(room, rows, slot.buckets, slot.outputs)
        self.taken = self.taken.plus(room, -1)
        del self._placed[number]
        slot.bank_rows, slot.buckets, slot.outputs = None, 0, 0

    def _give_back(self, room: Room, rows: np.ndarray, buckets: int, outputs: int) -> None:
        self.free_rows.extend(reversed(rows.tolist()))
        self._buckets.give(buckets, room.buckets)
        self._outputs.give(outputs, room.outputs)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    # Other tensors

    def _fresh(self, sizes: Room, slots: int) -> BankTensors:
        with self._writing():
            return BankTensors.empty(
                sizes.rows, self._hidden_size, sizes.buckets, sizes.outputs, slots, self._dtype, self._device
            )

    def _grown(self, sizes: Room, slots: int) -> BankTensors:
        old = self.tensors
        new = self._fresh(sizes, slots)
        with self._writing():
            for name in ("rows", "entries", "outputs", "table"):
                tensor = getattr(old, name)
                getattr(new, name)[: len(tensor)] = tensor
        self.free_rows[:0] = reversed(range(len(old.rows), sizes.rows))
        return new

    def _compact(self, sizes: Room, slots: int) -> None:
        """Put the same contents into tensors of the least size, one slot's after the other's."""
        old, new = self.tensors, self._fresh(sizes, slots)
        rows = np.concatenate([np.empty(0, np.int64), *(slot.present for slot in self._placed.values())])
        moved = np.full(len(old.rows), -1)
        moved[rows] = np.arange(len(rows))
        where, buckets, outputs = self._to_device(moved), Runs(), Runs()
        places = {}
        with self._writing():
            new.rows[: len(rows)] = old.rows[self._to_device(rows)]
            for number, slot in self._placed.items():
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
        for number, slot in self._placed.items():
            slot.buckets, slot.outputs = places[number]
            slot.bank_rows = moved[slot.present]
        self._buckets, self._outputs = buckets, outputs
        self.free_rows = list(reversed(range(len(rows), sizes.rows)))

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

    # Streams: on a CPU these do nothing.

    @contextmanager
    def _writing(self, source: torch.Tensor | None = None) -> Iterator[None]:
        """A block of device writes, on the storage's own stream. source: a tensor that is read there."""
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            if source is not None and source.is_cuda:
                source.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                yield
                self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._ready.record(self._stream)

    def wait_for_writes(self, reader: Any) -> None:
        """Let a stream, for None the current one, wait for all that was written; it reads from then on."""
        if self._stream is None:
            return
        reader = reader or torch.cuda.current_stream(self._device)
        self._readers.add(reader)
        if self._ready is not None:
            reader.wait_event(self._ready)

    def reached(self, reader: Callable[[], Any]) -> torch.cuda.Event | None:
        """What the stream that `reader` gives, or for None the current one, has come to; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(reader() or torch.cuda.current_stream(self._device))
        return event

    def wait_for_readers(self, slot: Slot) -> None:
        """Let what is written from now on wait for what a slot's readers had come to."""
        for event in slot.events:
            event.wait(self._stream)
        slot.events = []
