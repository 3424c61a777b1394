"""A bank that grows: the rows of any number of patches on one device.

A slot's content never changes while it is in use: `replace` fills another slot, and what a slot held is given up
when its last user has let go. The tensors are published together, as one `BankTensors`. So a reader sees one content
from beginning to end, without a lock on the way. How the tensors are written, storage.py says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ksl_patch.bank.eviction import Eviction
from ksl_patch.bank.lookup import BankTensors, SlotRows
from ksl_patch.bank.slots import Slot
from ksl_patch.bank.storage import Storage
from ksl_patch.bank.turns import Turns
from ksl_patch.errors import BankError


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
        if evict and budget is None:
            raise BankError("evict=True moves patches out of a budget: give one, budget=BYTES.")
        self._turns = Turns()
        self._storage = Storage(
            hidden_size, dtype, self.device, capacity=capacity, output_width=output_width, budget=budget
        )
        self._slots: dict[int, Slot] = {}
        self._eviction = Eviction(self._storage, self._slots, evict=evict)
        self._free_slots: list[int] = []
        self._used_slots = 1
        self._reserved_width = output_width
        self._fixed_width: int | None = None
        self._widths = Counter[int]()  # how many loaded patches change so many of the head's rows

    def __len__(self) -> int:
        """Patches in the bank, evicted ones included."""
        with self._exclusive():
            return sum(not slot.retired for slot in self._slots.values())

    @property
    def tensors(self) -> BankTensors:
        """What a reader takes, once for each step."""
        return self._storage.tensors

    @property
    def budget(self) -> int | None:
        """Bytes that rows and entries may take on the device; None for no limit."""
        return self._storage.budget

    @property
    def generation(self) -> int:
        """How often the tensors were others."""
        return self._storage.generation

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
            self._storage.fixed = True

    def add(self, patch: SlotRows) -> int:
        """Put a patch into a free slot. Raises BankError when it does not fit the table or the budget."""
        slot, rows = Slot.of(patch, self.vocab_size, self.hidden_size)
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
        new, rows = Slot.of(patch, self.vocab_size, self.hidden_size)
        with self._exclusive():
            old = self._entry(slot)
            if old.holds or old.host is not None or self._storage.fits(new.room):
                number = self._add(new, rows)
                self.remove(slot)
                return number
            # The two do not fit beside each other: the new one gets the room of the old one.
            self._eviction.to_go(new.room, slot)
            self._eviction.put_aside(slot)
            try:
                number = self._add(new, rows)
            except BaseException:
                self._eviction.bring_back(slot)
                self._eviction.may_go(slot)
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
                    self._eviction.stays(number)
                away = [number for number in held if self._slots[number].host is not None]
                if len(away) > 1:
                    self._eviction.check_together(away)
                for number in away:
                    self._eviction.bring_back(number)
            self.wait_for_writes(stream())
            yield
        finally:
            if taken:
                self._turns.note((taken, self._storage.reached(stream)), self._settle)

    def wait_for_writes(self, stream: Any = None) -> None:
        """On CUDA, let a stream (the current one by default) wait for all that was written; it reads from then on."""
        if self.device.type == "cuda":  # without waiting for a turn elsewhere
            with self._exclusive():
                self._storage.wait_for_writes(stream)

    def is_prompt_only(self, slot: int) -> bool:
        """Whether a slot's rows act on the prompt alone."""
        return slot != 0 and self._entry(slot).prompt_only

    def contents(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A held slot's token ids int64 [k], rows [k, d], and the head's rows: None, the same tensor, or others."""
        with self._exclusive():
            entry = self._entry(slot)
            if entry.bank_rows is None:
                raise BankError(f"slot {slot} was evicted: hold it to bring it back.")
            return self._storage.contents(entry)

    def _exclusive(self) -> AbstractContextManager[None]:
        """A `with` block in which this thread alone changes the bank."""
        return self._turns.exclusive(self._settle)

    def _settle(self, ended: tuple[list[int], torch.cuda.Event | None]) -> None:
        """Do what a hold that has ended leaves to do."""
        taken, event = ended
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
                self._eviction.may_go(number)

    def _entry(self, number: int) -> Slot:
        entry = self._slots.get(number)
        if entry is None or (entry.retired and not entry.holds):
            raise BankError(f"slot {number} of the bank is empty.")
        return entry

    def _add(self, slot: Slot, rows: torch.Tensor) -> int:
        if slot.output and self._fixed_width is not None and len(slot.token_ids) > self._fixed_width:
            raise BankError(
                f"the patch changes {len(slot.token_ids)} rows of the head, and the CUDA graph that was captured "
                f"has room for {self._fixed_width}: reserve them with output_width before it is captured."
            )
        number = self._free_slots[-1] if self._free_slots else self._used_slots
        self._eviction.place(number, slot, rows)
        if number == self._used_slots:
            self._used_slots += 1
        else:
            self._free_slots.pop()
        self._slots[number] = slot
        self._eviction.may_go(number)
        if slot.output:
            self._widths[len(slot.token_ids)] += 1
        return number

    def _clear(self, number: int) -> None:
        slot = self._slots.pop(number)
        self._storage.wait_for_readers(slot)
        if slot.output:
            self._widths[len(slot.token_ids)] -= 1
            self._widths = +self._widths  # without those of which there is none
        if slot.bank_rows is not None:
            self._eviction.stays(number)
            self._storage.release(number, slot)
        self._free_slots.append(number)
