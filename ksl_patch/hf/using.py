"""The `using` block as an object; functions bound to a choice are binding.py's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from ksl_patch.errors import RunError


class Using:
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
        """Raise RunError: a `using` block is none."""
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
