"""The choice: which patch each row, or each position, of a forward pass uses, and for how long that holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from ksl_patch.errors import RunError


@dataclass(eq=False)
class Block:
    """The `using` block that a choice was made in. What was started in it may go on after it, and is then refused.

    opener: the frame of a generator that opened it, which may be left in the middle of it.
    """

    is_open: bool = True
    opener: FrameType | None = None

    def close(self) -> None:
        """End the block."""
        self.is_open, self.opener = False, None

    def check(self) -> None:
        """Raise RunError once the block has ended, and while its generator is suspended in it."""
        if not self.is_open:
            raise RunError(
                "the block that chose the patch has ended, and what was started in it still runs: keep the block open "
                "until that is done, or hand the choice over with `handle.bind`."
            )
        if self.opener is not None and self.opener.f_back is None:
            raise RunError(
                "the `using` block that is open here was opened by a generator, which is suspended in it: bind the "
                "generator with `handle.bind` instead, so that its choice holds in its own steps alone."
            )


@dataclass(eq=False)
class Seen:
    """One forward pass: the token ids that it was given, and what it has used of the patched modules.

    before: columns that earlier forwards of the same `generate` have read.
    """

    token_ids: torch.Tensor | None = None
    before: int = 0
    needs_embedding: bool = True
    embedding: bool = False
    head: bool = False

    def check_order(self, token_ids: torch.Tensor, *, columns: bool) -> None:
        """Raise RunError unless the rows of a lookup are those of the forward, and its columns where they count.

        Some models add columns or look up a part of them; XLNet turns the batch around, which a square one hides.
        """
        given = self.token_ids
        if given is None or given is token_ids:
            return
        batch, length = given.shape
        same = token_ids.shape == given.shape if columns else len(token_ids) == batch
        if same and token_ids.shape == (length, batch) and batch > 1:
            same = torch.equal(token_ids, given.to(token_ids))
        if not same:
            raise RunError(
                f"this model looks up token ids {list(token_ids.shape)} where it was given {[batch, length]}, so it is "
                "not known which row or column is whose: choose one patch of scope 'all' for the whole batch."
            )


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

    slots: int64 [N], one entry for each row. is_single: the one entry is for all of them. width: the most rows of the
    head that one of them changes. after: the slots behind the prompt, where some patch has scope "prompt". each: rows
    that `generate` has made of every prompt. mask: bool [B, T], the prompt's positions of a forward that is not
    `generate`'s. seen: the forward pass that is under way.
    """

    block: Block
    slots: torch.Tensor
    width: int
    is_single: bool = False
    after: torch.Tensor | None = None
    each: int = 1
    prompt: Prompt | None = None
    mask: torch.Tensor | None = None
    seen: Seen | None = None
    turn: Turn = field(default_factory=Turn)

    def begin(self, kwargs: dict[str, Any], token_ids: torch.Tensor | None) -> Choice:
        """The choice of one forward pass with these arguments and token ids int64 [B, T]."""
        before = 0
        if self.after is not None and self.prompt is not None:
            before = _columns_before(self.prompt, kwargs, None if token_ids is None else token_ids.shape[1])
        needed = kwargs.get("encoder_outputs") is None  # else the decoder may have a table of its own
        return dataclasses.replace(self, seen=Seen(token_ids, before, needed))

    def check_count(self, prompts: int) -> None:
        """Raise RunError unless the entries are for so many prompts."""
        if not self.is_single and len(self.slots) != prompts:
            raise RunError(f"{len(self.slots)} patches were chosen for {prompts} prompts: give an entry for each.")

    def rows(self, slots: torch.Tensor, batch: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1] or [1, 1]."""
        if not self.is_single:
            if len(slots) * self.each != batch:
                raise RunError(f"{len(slots)} patches were chosen for a batch of {batch}: give one entry for each row.")
            slots = slots.repeat_interleave(self.each)  # beams and return sequences of one prompt stay together
        return slots[:, None]

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each position that the embedding sees, broadcastable to token_ids."""
        if self.is_single and self.after is None:
            return self.slots.view([1] * token_ids.ndim)
        if token_ids.ndim != 2:
            raise RunError(f"token ids {list(token_ids.shape)} are looked up, and patches are chosen for [B, T].")
        batch, length = token_ids.shape
        seen = self.seen
        if seen is not None:
            seen.check_order(token_ids, columns=self.after is not None)
        slots = self.rows(self.slots, batch)
        if self.after is None:
            return slots
        after = self.rows(self.after, batch)
        if self.prompt is not None:
            if seen is None or seen.embedding:  # a lookup of which no forward pass has said where it is
                raise _unclear()
            column = seen.before + torch.arange(length, device=slots.device)
            return torch.where(column < self.prompt.columns, slots, after)
        if self.mask is not None and self.mask.shape == token_ids.shape:
            return torch.where(self.mask, slots, after)
        if self.mask is not None:
            raise RunError(
                f"the prompt was marked in {list(self.mask.shape)} positions, and this forward pass has "
                f"{[batch, length]}: mark it for each forward pass."
            )
        raise RunError(
            "a patch of scope 'prompt' acts in `generate` and `generate_batch`, which know where the prompt ends: this "
            "forward pass does not. Say which positions are the prompt's with `handle.marking(mask)`."
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The slot of each position that the head sees, hidden [B, ..., d]; broadcastable to [B, ...] made flat."""
        if self.is_single:
            return self.slots[:, None]
        if hidden.ndim < 3:
            raise RunError("this head sees positions without their rows: choose one patch for the whole batch.")
        return self.rows(self.slots, hidden.shape[0])


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

    def begin(self, kwargs: dict[str, Any], token_ids: torch.Tensor | None) -> Packed:
        """The choice of one forward pass."""
        return dataclasses.replace(self, seen=Seen())

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each position that the embedding sees, [1, T]."""
        return self._checked(self.positions, token_ids.shape)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The slot of each position that the head sees."""
        slots = self.positions if self.kept is None else self.positions[:, self.kept]
        return self._checked(slots, hidden.shape[:-1])

    def _checked(self, slots: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if slots.shape != shape:
            raise RunError(f"a packed batch of {slots.shape[1]} positions came as {list(shape)}.")
        return slots


class StaticChoice:
    """A choice in one device buffer, int64 [max_batch], which compiled code and CUDA graphs read.

    fits: for each size of a batch, whether the entries are for it. It is what compiled code looks at, and the same for
    every right call, so that nothing is compiled again.
    """

    def __init__(self, max_batch: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.entries = 0
        self.fits = [True] * (max_batch + 1)

    def fill(self, choice: Choice, each: int = 1) -> None:
        """Choose its slots, for `each` rows of the batch each, or its one for every row."""
        size = len(self.slots)
        if choice.is_single:
            self.slots.copy_(choice.slots.expand(size))
            self.fits[:] = [True] * (size + 1)
            return
        rows = choice.slots.repeat_interleave(each)
        if len(rows) > size:
            raise RunError(f"{len(rows)} rows are more than the max_batch={size} of `attach`.")
        self.slots.zero_()
        self.slots[: len(rows)] = rows
        self.entries = len(choice.slots)
        self.fits[:] = [batch == len(rows) for batch in range(size + 1)]

    def clear(self) -> None:
        """Choose the base."""
        self.slots.zero_()
        self.fits[:] = [True] * len(self.fits)

    def rows(self, batch: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1]."""
        if batch > len(self.slots):
            raise RunError(f"a batch of {batch} rows is more than the max_batch={len(self.slots)} of `attach`.")
        if not self.fits[batch]:
            raise RunError(f"{self.entries} patches were chosen for a batch of {batch}: give one entry for each row.")
        return self.slots[:batch, None]


def _unclear() -> RunError:
    return RunError(
        "a patch of scope 'prompt' needs to know where the prompt ends, and the state of this model or this way of "
        "generating does not say how much it has read."
    )


def _columns_before(prompt: Prompt, kwargs: dict[str, Any], length: int | None) -> int:
    """Columns that earlier forwards have read, by the cache; without one every forward is given everything again.

    Raises RunError where neither is so, since it cannot be told what is the prompt.
    """
    cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
    unclear = _unclear()
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
        # What the cache has at first is the beginning of the prompt, and not something before it.
        if prompt.length or (before and before + length > prompt.columns):
            raise unclear
    elif before < prompt.columns and before != prompt.end:
        raise unclear
    prompt.end = before + length
    return before
