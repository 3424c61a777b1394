"""The choice: which patch each row, or each position, of a forward pass uses, and for how long that holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from ksl_patch.errors import RunError


@dataclass(eq=False)
class Block:
    """The `using` block that a choice was made in. What was started in it may go on after it, and is then refused."""

    is_open: bool = True

    def close(self) -> None:
        """End the block."""
        self.is_open = False

    def check(self) -> None:
        """Raise RunError once the block has ended."""
        if not self.is_open:
            raise RunError(
                "the block that chose the patch has ended, and what was started in it still runs: keep the block open "
                "until that is done, or hand the choice over with `handle.bind`."
            )


@dataclass(eq=False)
class Seen:
    """What one forward pass has used of the patched modules."""

    embedding: bool = False
    head: bool = False


@dataclass(eq=False)
class Prompt:
    """How far one `generate` has come. columns: of its prompt. end: of what earlier forwards have read, by the cache.

    length: of the last forward where there is no cache, which is given everything again.
    """

    columns: int
    end: int | None = None
    length: int = 0


@dataclass(eq=False)
class Turn:
    """How many requests of continuous batching have got their entry of a choice, and what went wrong with one."""

    taken: int = 0
    error: BaseException | None = None


@dataclass(frozen=True)
class Choice:
    """Which slot each row of a batch uses.

    slots: int64 [N], one entry for each row, or [1] for all of them. width: the most rows of the head that one of
    them changes. after: the slots behind the prompt, where some patch has scope "prompt". each: rows that `generate`
    has made of every prompt. mask: bool [B, T], the prompt's positions of a forward that is not `generate`'s.
    before: columns that earlier forwards of a `generate` have read.
    """

    block: Block
    slots: torch.Tensor
    width: int
    after: torch.Tensor | None = None
    each: int = 1
    prompt: Prompt | None = None
    mask: torch.Tensor | None = None
    before: int = 0
    seen: Seen | None = None
    turn: Turn = field(default_factory=Turn)

    def begin(self, kwargs: dict[str, Any], length: int | None) -> Choice:
        """The choice of one forward pass with these arguments, over so many columns."""
        before = 0
        if self.after is not None and self.prompt is not None:
            before = _columns_before(self.prompt, kwargs, length)
        return dataclasses.replace(self, before=before, seen=Seen())

    def rows(self, slots: torch.Tensor, batch: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1] or [1, 1]."""
        if len(slots) > 1:
            if len(slots) * self.each != batch:
                raise RunError(f"{len(slots)} patches were chosen for a batch of {batch}: give one entry for each row.")
            slots = slots.repeat_interleave(self.each)  # beams and return sequences of one prompt stay together
        return slots[:, None]

    def embedding(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the embedding sees, broadcastable to [B, T]."""
        slots = self.rows(self.slots, batch)
        if self.after is None:
            return slots
        after = self.rows(self.after, batch)
        if self.prompt is not None:
            column = self.before + torch.arange(length, device=slots.device)
            return torch.where(column < self.prompt.columns, slots, after)
        if self.mask is not None and self.mask.shape == (batch, length):
            return torch.where(self.mask, slots, after)
        raise RunError(
            "a patch of scope 'prompt' acts in `generate` and `generate_batch`, which know where the prompt ends: this "
            "forward pass does not. Say which positions are the prompt's with `handle.marking(mask)`."
        )

    def head(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the head sees."""
        return self.rows(self.slots, batch)


@dataclass(frozen=True)
class Packed:
    """Which slot each position of a packed batch uses: positions int64 [1, T], of which the head sees those at `kept`.

    kept: int [N], or None where the head sees all.
    """

    block: Block
    positions: torch.Tensor
    width: int
    kept: torch.Tensor | None = None
    seen: Seen | None = None

    def begin(self, kwargs: dict[str, Any], length: int | None) -> Packed:
        """The choice of one forward pass."""
        return dataclasses.replace(self, seen=Seen())

    def embedding(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the embedding sees, [1, T]."""
        return self._checked(self.positions, batch, length)

    def head(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the head sees."""
        slots = self.positions if self.kept is None else self.positions[:, self.kept]
        return self._checked(slots, batch, length)

    def _checked(self, slots: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        if slots.shape != (batch, length):
            raise RunError(f"a packed batch of {slots.shape[1]} positions came as {[batch, length]}.")
        return slots


class StaticChoice:
    """A choice in one device buffer, int64 [max_batch], which compiled code and CUDA graphs read.

    fits: for each size of a batch, whether the entries are for it. It is what compiled code looks at, and the same for
    every right call, so that nothing is compiled again.
    """

    def __init__(self, max_batch: int, device: torch.device, strict: bool) -> None:
        self.slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.entries = 0
        self.is_idle = not strict
        self._strict = strict
        self.fits = [self.is_idle] * (max_batch + 1)

    def fill(self, slots: torch.Tensor, each: int = 1) -> None:
        """Choose slots int64 [N], for `each` rows of the batch each, or one for every row."""
        size = len(self.slots)
        if len(slots) * each > size and len(slots) > 1:
            raise RunError(f"{len(slots) * each} rows are more than the max_batch={size} of `attach`.")
        self.entries, self.is_idle = len(slots), False
        if len(slots) == 1:
            self.slots.copy_(slots.expand(size))
            self.fits[:] = [True] * (size + 1)
        else:
            rows = slots.repeat_interleave(each)
            self.slots.zero_()
            self.slots[: len(rows)] = rows
            self.fits[:] = [batch == len(rows) for batch in range(size + 1)]

    def clear(self) -> None:
        """Choose the base, or nothing where a choice must be made."""
        self.slots.zero_()
        self.entries, self.is_idle = 0, not self._strict
        self.fits[:] = [self.is_idle] * len(self.fits)

    def rows(self, batch: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1]."""
        if batch > len(self.slots):
            raise RunError(f"a batch of {batch} rows is more than the max_batch={len(self.slots)} of `attach`.")
        if not self.fits[batch]:
            if not self.entries:
                raise RunError("no patch was chosen, and the handle is strict: choose one with `using`, or None.")
            raise RunError(f"{self.entries} patches were chosen for a batch of {batch}: give one entry for each row.")
        return self.slots[:batch, None]


def _columns_before(prompt: Prompt, kwargs: dict[str, Any], length: int | None) -> int:
    """Columns that earlier forwards have read, by the cache; without one every forward is given everything again.

    Raises RunError where neither is so, since it cannot be told what is the prompt.
    """
    cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
    unclear = RunError(
        "a patch of scope 'prompt' needs to know where the prompt ends, and the state of this model or this way of "
        "generating does not say how much it has read."
    )
    if length is None or any(kwargs.get(name) is not None for name in ("cache_params", "state", "mems")):
        raise unclear
    if cache is None:
        if length <= prompt.length or prompt.end is not None:
            raise unclear
        prompt.length = length
        return 0
    try:
        before = int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:  # a state of another kind
        raise unclear from error
    if prompt.end is None:
        if prompt.length:
            raise unclear
    elif before < prompt.columns and before != prompt.end:
        raise unclear
    prompt.end = before + length
    return before
