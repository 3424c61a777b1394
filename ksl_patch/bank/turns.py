"""A growing bank's lock: one thread changes it at a time, and finalisers leave a note and never wait."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Settle = Callable[[Any], None]


class Turns:
    """The end of a hold may come from a finaliser, at any point of any thread, also in the middle of a change.

    So it is only noted, and settled between two changes, without waiting for anybody. What settles it comes with each
    call: kept here, it would keep the bank, and its memory, until the garbage collector comes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._noted: collections.deque[Any] = collections.deque()

    @contextmanager
    def exclusive(self, settle: Settle) -> Iterator[None]:
        """A `with` block in which this thread alone makes changes. settle: takes what was noted, before and after."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._settle(settle)
                yield
            finally:
                try:
                    if self._depth == 1:
                        self._settle(settle)
                finally:
                    self._depth -= 1

    def note(self, ended: Any, settle: Settle) -> None:
        """Have something settled: now if nobody makes changes, else when they are made."""
        self._noted.append(ended)
        if self._lock.acquire(blocking=False):
            try:
                if self._depth == 0:
                    with self.exclusive(settle):
                        pass
            finally:
                self._lock.release()

    def _settle(self, settle: Settle) -> None:
        while self._noted:
            settle(self._noted.popleft())
