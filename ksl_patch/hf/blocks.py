"""`using` blocks: what the names of loaded patches stand for, and which choice holds in this thread or task.

What a choice is, choice.py says, and what it does in a forward pass, hooks.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from ksl_patch.bank import PatchBank
from ksl_patch.errors import RunError
from ksl_patch.hf.choice import Block, Choice, Packed, StaticChoice
from ksl_patch.hf.patched_model import PatchedModel
from ksl_patch.patch import PatchMeta

Names = str | Sequence[str | None] | None


@dataclass(frozen=True)
class Loaded:
    """What a name stands for."""

    slot: int
    digest: str
    meta: PatchMeta


class Blocks:
    """The names, the blocks and the choices of one handle.

    lock: of names and blocks. loaded: what each name stands for. current: the choice of this thread or task. static:
    the one choice of a handle with `max_batch`. open: blocks that are open; requests: ids of what is held for requests
    of continuous batching; running: calls of `generate`. These are sets, which a finaliser may change at any point.
    """

    def __init__(self, model: PatchedModel, bank: PatchBank, *, max_batch: int | None, strict: bool) -> None:
        self._model, self._bank, self._strict = model, bank, strict
        self.lock = threading.RLock()
        self.loaded: dict[str, Loaded] = {}
        self.current: ContextVar[Choice | Packed | None] = ContextVar("ksl_patch_choice", default=None)
        self.static = None if max_batch is None else StaticChoice(max_batch, model.table.device)
        self.open: set[Block] = set()
        self.requests: set[int] = set()
        self.running: set[object] = set()

    def find(self, name: str) -> Loaded:
        """What a name stands for now. Raises RunError."""
        loaded = self.loaded.get(name)
        if loaded is None:
            raise RunError(f"no patch named {name!r} is loaded; loaded are: {', '.join(self.loaded) or 'none'}.")
        return loaded

    def slots(self, names: Names) -> tuple[list[int], bool]:
        """The slots of names, and whether it is one for all rows."""
        single = names is None or isinstance(names, str)
        wanted: Any = [names] if single else names
        if isinstance(wanted, Iterable):
            wanted = list(wanted)
        if not isinstance(wanted, list) or not wanted:
            raise RunError("no patch was chosen: give a name, None for the base, or an entry for each row.")
        return [0 if name is None else self.find(name).slot for name in wanted], single

    def using(self, names: Names) -> AbstractContextManager[None]:
        """A `with` block of a choice by names."""
        return _Using(lambda opener: self._opened(lambda: self.slots(names), opener))

    @contextmanager
    def serving(self, slots: int | Sequence[int]) -> Iterator[None]:
        """A `with` block of a choice by slots of the bank."""
        single = isinstance(slots, int)
        wanted: list[int] = [slots] if isinstance(slots, int) else list(slots)
        with self._opened(lambda: (wanted, single)):
            yield

    @contextmanager
    def marking(self, mask: torch.Tensor) -> Iterator[None]:
        """A `with` block of the same choice, in which forward passes have the prompt where mask bool [B, T] says."""
        choice = self.current_choice()
        if not isinstance(choice, Choice):
            raise RunError("a prompt is marked inside a `using` block.")
        with self.choosing(dataclasses.replace(choice, mask=mask.to(self._model.table.device, torch.bool))):
            yield

    def for_call(self, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """The `using` block of one call that was given `patch=`, which is taken out of its arguments."""
        return self.using(kwargs.pop("patch")) if "patch" in kwargs else nullcontext()

    def packed(self, positions: torch.Tensor, kept: torch.Tensor | None, width: int) -> AbstractContextManager[None]:
        """A `with` block for a packed batch: the slot of each position, int64 [1, T]; the head sees `kept` of them."""
        return self.choosing(Packed(Block(), positions, width, kept))

    @contextmanager
    def _opened(self, resolve: Callable[[], tuple[list[int], bool]], opener: FrameType | None = None) -> Iterator[None]:
        with self.holding(resolve, opener) as choice, self.choosing(choice):
            yield

    @contextmanager
    def holding(
        self, resolve: Callable[[], tuple[list[int], bool]], opener: FrameType | None = None
    ) -> Iterator[Choice]:
        """A `with` block that holds the slots of a choice, without choosing it for this thread or task.

        resolve: gives the slots, and whether the one is for all rows. opener: as in `Block`.
        """
        with ExitStack() as stack:
            with self.lock:
                self._model.check_attached()
                merged = self._model.merged
                if merged is not None:
                    raise RunError(f"{merged.name} is merged into the model: unmerge it before choosing patches.")
                if self.static is not None and self.open:
                    raise RunError("a handle with max_batch serves one batch at a time: another block is open.")
                self._model.check_unchanged()
                slots, single = resolve()
                stack.enter_context(self._bank.hold(slots))
                choice = self.make_choice(slots, single, opener)
                self.open.add(choice.block)
                stack.callback(self.open.discard, choice.block)
            stack.callback(choice.block.close)
            if self.static is not None:
                stack.callback(self.static.clear)
                self.static.fill(choice)
            yield choice
            if not single and 0 < choice.turn.taken < len(slots):
                made = f"{choice.turn.taken} requests made of them: give an entry for each."
                raise RunError(f"{len(slots)} patches were chosen and {made}")

    @contextmanager
    def choosing(self, choice: Choice | Packed | None) -> Iterator[None]:
        """A `with` block of this choice. Blocks may end in another order or context than they began in."""
        before = self.current.get()
        self.current.set(choice)
        try:
            yield
        finally:
            now = self.current.get()
            if now is not None and choice is not None and now.block is choice.block:
                is_over = before is not None and not before.block.is_open
                self.current.set(None if is_over else before)

    def make_choice(self, slots: list[int], single: bool, opener: FrameType | None = None) -> Choice:
        """The choice of these slots."""
        device = self._model.table.device
        after = None
        if any(map(self._bank.is_prompt_only, slots)):
            after = torch.tensor([0 if self._bank.is_prompt_only(slot) else slot for slot in slots], device=device)
        block = Block(opener=opener)
        return Choice(block, torch.tensor(slots, device=device), self._bank.width_of(slots), single, after)

    def current_choice(self) -> Choice | Packed | None:
        """The choice that holds here, None for the base where nobody chose."""
        choice = self.current.get()
        if self._model.merged is not None:
            return None  # which everybody is answered with
        if choice is not None:
            choice.block.check()
        elif self._strict:
            raise RunError("no patch was chosen, and the handle is strict: choose one with `using`, or None.")
        elif self.open:
            raise RunError(
                "no patch was chosen in this thread or task, while another one has a `using` block open: hand its "
                "choice over with `handle.bind(name)(function)`, or choose the base with `using(None)`."
            )
        return choice

    def choice_for_request(self) -> Choice | None:
        """The choice that a request made here gets. Raises RunError as a forward pass here would."""
        self._model.check_attached()
        choice = self.current_choice()
        assert not isinstance(choice, Packed)
        return choice

    @contextmanager
    def counted_running(self) -> Iterator[None]:
        """A `with` block of one call of `generate`."""
        call = object()
        self.running.add(call)
        try:
            yield
        finally:
            self.running.discard(call)

    def check_nothing_runs(self, what: str, *, managers: bool) -> None:
        """Raise RunError while anything is served. managers: whether one of continuous batching generates."""
        if self.open:
            raise RunError(
                f"{what} while a `using` block or a bound generator is open ({len(self.open)} in all): end it, or "
                "close the generator."
            )
        if self.requests:
            raise RunError(
                f"{what} while {len(self.requests)} requests of continuous batching wait or run: stop their manager, "
                "or destroy one that was never started."
            )
        if self.running or managers:
            raise RunError(f"{what} while the model generates: wait for it, or stop its managers.")


class _Using:
    """A `using` block, which is opened where it is entered, and is no decorator: `bind` is."""

    def __init__(self, open_block: Callable[[FrameType | None], AbstractContextManager[None]]) -> None:
        self._open_block = open_block
        self._block: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if self._block is not None:
            raise RunError("this `using` block is open already: make another one.")
        block = self._open_block(_generator_that_opens(sys._getframe(1)))
        block.__enter__()
        self._block = block

    def __exit__(self, *error: Any) -> None:
        block, self._block = self._block, None
        assert block is not None
        block.__exit__(*error)

    def __call__(self, function: Any) -> Any:
        """Raise RunError: a `using` block is no decorator."""
        raise RunError("`using` opens a block: to choose for a function, decorate it with `handle.bind(names)`.")


def _generator_that_opens(frame: FrameType | None) -> FrameType | None:
    """The frame of the generator that opens a `using` block, where it may be left in the middle of it.

    A generator behind `contextmanager`, or a fixture, is left on purpose: its block is its caller's.
    """
    while frame is not None and _package(frame) == "contextlib":  # an ExitStack
        frame = frame.f_back
    opener = frame
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
        while frame is not None and _package(frame) == "torch":  # a generator under `torch.no_grad`
            frame = frame.f_back
        if frame is None or _package(frame) in ("contextlib", "_pytest"):
            return None
    return None if frame is opener else opener


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
