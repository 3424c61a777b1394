"""Interrupts of a training: Ctrl-C, a closed terminal, a request to end; what is then kept, tune.py says."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_noted(note: Callable[[], None]) -> Iterator[None]:
    """Have a first interrupt call `note` in place of ending the program; a second one raises KeyboardInterrupt.

    An interrupt is Ctrl-C, a closed terminal, or a request to end (SIGTERM). Where this is not the main thread, or one
    process of several, interrupts stay what they are.
    """
    alone = threading.current_thread() is threading.main_thread() and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not alone:
        yield
        return
    noted = False

    def handle(*_: Any) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        note()

    handled = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    # What is ignored stays so: nohup, or a script's job in the background.
    before = {each: signal.signal(each, handle) for each in handled if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
