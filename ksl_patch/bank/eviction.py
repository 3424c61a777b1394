"""Which patches a growing bank moves to host memory when its budget is short; storage.py copies them."""

from __future__ import annotations

import torch

from ksl_patch.bank.slots import Gone, Room, Slot
from ksl_patch.bank.storage import SPARE, Storage
from ksl_patch.errors import BankError


class Eviction:
    """The way into a storage, and out of it: the slots that may go, the least recently used first.

    slots: all of the bank. evict: whether any may go, or a patch that does not fit is refused.
    """

    def __init__(self, storage: Storage, slots: dict[int, Slot], *, evict: bool) -> None:
        self._storage, self._slots, self._evict = storage, slots, evict
        self._idle: dict[int, None] = {}  # on the device and held by nobody

    def may_go(self, number: int) -> None:
        """A slot is used no more; it is the last to go."""
        self._idle[number] = None

    def stays(self, number: int) -> None:
        """A slot is in use, or is no more."""
        self._idle.pop(number, None)

    def place(self, number: int, slot: Slot, rows: torch.Tensor) -> None:
        """Put a slot on the device, where others may have to go. Raises BankError, with nothing changed."""
        lines = len(self._storage.tensors.table)
        if number >= lines:
            if self._storage.fixed:
                raise BankError(
                    f"a CUDA graph has captured the bank, which has lines for {lines - 1} patches: reserve more."
                )
            lines = number + 1 + lines // SPARE
        for oldest in self.to_go(slot.room):
            self.put_aside(oldest)
        self._storage.make_room(slot.room, lines, self._put_oldest_aside)
        self._storage.place(number, slot, rows)

    def to_go(self, room: Room, replaced: int | None = None) -> list[int]:
        """The least recently used slots that must go before a slot of this room fits. Raises BankError.

        replaced: a slot that goes first.
        """
        gone, going = Gone(), []
        if replaced is not None:
            gone.add(self._slots[replaced].room)
        for number in self._idle if self._evict else ():
            if self._storage.fits(room, gone):
                break
            if number != replaced:
                gone.add(self._slots[number].room)
                going.append(number)
        if self._storage.fits(room, gone):
            return going
        if self._storage.fixed:
            raise BankError(
                f"the bank has no room for {room.rows} more rows, and its tensors cannot move since a CUDA graph has "
                "captured them: reserve more with capacity before it is captured."
            )
        held = sum(slot.holds > 0 for slot in self._slots.values())
        there, nbytes = sum(not slot.retired for slot in self._slots.values()), self._storage.tensors.nbytes
        raise BankError(
            f"the bank's budget of {self._storage.budget:,} bytes has no room for {room.rows} more rows beside "
            + (
                f"the {held} patches in use: raise the budget, or choose fewer at once."
                if self._evict
                else f"{there} patches ({nbytes:,} bytes): remove some, raise the budget, or let it evict."
            )
        )

    def check_together(self, numbers: list[int]) -> None:
        """Raise BankError unless several slots fit the budget at once, when all that is idle has gone."""
        if self._storage.budget is None or self._storage.fixed:
            return
        need = self._storage.taken
        for number in self._idle if self._evict else ():
            need = need.plus(self._slots[number].room, -1)
        for number in numbers:
            need = need.plus(self._slots[number].room)
        if not self._storage.affords(need):
            raise BankError(
                f"the bank's budget of {self._storage.budget:,} bytes has no room for the {len(numbers)} patches that "
                "are wanted at once: choose fewer in a batch, or raise the budget."
            )

    def bring_back(self, number: int) -> None:
        """Put a slot that was evicted on the device again, as `place` does."""
        slot = self._slots[number]
        assert slot.host is not None
        self.place(number, slot, slot.host)

    def put_aside(self, number: int) -> None:
        """Evict a slot that nobody holds."""
        self._storage.to_host(number, self._slots[number])
        del self._idle[number]

    def _put_oldest_aside(self) -> bool:
        """Evict the slot that was used least recently, if patches may go and one is idle."""
        oldest = next(iter(self._idle), None) if self._evict else None
        if oldest is not None:
            self.put_aside(oldest)
        return oldest is not None
