"""What a build tells while it runs: bars for people, JSON lines for programs, nothing for a library's user."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.prompt import Confirm

from ksl_patch.errors import RunError
from ksl_patch.terminal import PlainConsole, visible

_UNKNOWN = 100  # steps of a stage that ends by itself, for how often a line is printed


class Reporter(Protocol):
    """Receives a build's events."""

    def note(self, event: str, message: str, **values: Any) -> None:
        """Something worth saying once."""

    def doubt(self, event: str, message: str, **values: Any) -> None:
        """Something that is probably wrong. Raises RunError where somebody was asked and does not want it."""

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        """A stage of `total` steps begins, None where it ends by itself.

        later: how many like them follow in other stages, where that is known.
        """

    def step(self, done: int, loss: float | None = None) -> None:
        """`done` steps of the stage are done; loss is per answer token, in nats."""

    def end(self) -> None:
        """The stage is over."""


class SilentReporter:
    """Says nothing."""

    def note(self, event: str, message: str, **values: Any) -> None:
        """Say nothing."""

    def doubt(self, event: str, message: str, **values: Any) -> None:
        """Say nothing."""

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        """Say nothing."""

    def step(self, done: int, loss: float | None = None) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


@contextmanager
def noting_warnings(reporter: Reporter) -> Iterator[None]:
    """A `with` block whose warnings the reporter notes at its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        reporter.note("warning", str(warning.message))


class _Pace:
    """Seconds a step, from the first steps of a stage, and what is left of it and of those that follow; once."""

    _STEPS = 4  # after the first, which is slower

    def __init__(self) -> None:
        self._said = False
        self._total: int | None = 0
        self._later: int | None = None
        self._first: tuple[int, float] | None = None

    def begin(self, total: int | None, later: int | None) -> None:
        self._total, self._later, self._first = total, later, None

    def step(self, done: int) -> tuple[float, float] | None:
        """Seconds a step and seconds left, when there is something to say."""
        if self._said or self._later is None or self._total is None:
            return None
        if self._first is None:
            self._first = done, time.monotonic()
        steps = done - self._first[0]
        if steps < self._STEPS:
            return None
        self._said = True
        each = (time.monotonic() - self._first[1]) / steps
        return each, each * (self._total - done + self._later)

    @staticmethod
    def in_words(each: float, left: float) -> str:
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        return f"{each:.2g} s a step: tuning takes {duration(left)} more, until {end}"


def _somebody_types() -> bool:
    """Whether standard input is a terminal, and this process one that may read from it."""
    try:
        return sys.stdin is not None and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # no terminal, or none of its own
        return False


def duration(seconds: float) -> str:
    """Seconds as people say them: "50 s", "4 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class JsonReporter:
    """One JSON object a line on standard output."""

    def __init__(self) -> None:
        self._stage = ""
        self._total: int | None = 0
        self._pace = _Pace()

    def note(self, event: str, message: str, **values: Any) -> None:
        """{"event": event, "message": ..., ...}."""
        self._print(event=event, message=message, **values)

    def doubt(self, event: str, message: str, **values: Any) -> None:
        """As `note`."""
        self.note(event, message, **values)

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        """{"event": "begin", "stage": ..., "steps": ...}."""
        self._stage, self._total = stage, total
        self._pace.begin(total, later)
        self._print(event="begin", stage=stage, steps=total)

    def step(self, done: int, loss: float | None = None) -> None:
        """{"event": "step", "stage": ..., "step": ..., "steps": ..., "loss": ...}; once {"event": "pace", ...}."""
        self._print(event="step", stage=self._stage, step=done, steps=self._total, loss=loss)
        if pace := self._pace.step(done):
            each, left = pace
            self.note("pace", _Pace.in_words(each, left), seconds_per_step=each, seconds_left=left)

    def end(self) -> None:
        """{"event": "end", "stage": ...}."""
        self._print(event="end", stage=self._stage)

    def _print(self, **values: Any) -> None:
        print(json.dumps(values, ensure_ascii=False), flush=True)


class RichReporter:
    """Progress bars with the loss and the time left, on standard error; plain lines where that is no terminal.

    ask: whether a doubt is a question, where a person can answer it.
    """

    def __init__(self, console: PlainConsole | None = None, *, ask: bool = False) -> None:
        self._console = console or PlainConsole(stderr=True)
        self._ask = ask and self._console.is_terminal and _somebody_types()
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total: int | None = 0
        self._stage, self._done, self._loss = "", 0, ""
        self._pace = _Pace()

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, event: str, message: str, **values: Any) -> None:
        """A line above the bars."""
        self._console.print(message, soft_wrap=not self._console.is_terminal)

    def doubt(self, event: str, message: str, **values: Any) -> None:
        """A line, and a question where somebody is there to answer it."""
        if not self._ask:
            self.note(event, f"Warning: {message}")
            return
        self._progress.stop()
        sure = False
        with suppress(EOFError):
            sure = Confirm.ask(f"{visible(message)} Go on?", console=self._console, default=False)
        if not sure:
            raise RunError("stopped, as you said: nothing was trained.")
        self._progress.start()

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        """A new bar."""
        self._stage, self._total, self._done, self._loss = stage, total, 0, ""
        self._pace.begin(total, later)
        self._task = self._progress.add_task(stage, total=total, loss="")

    def step(self, done: int, loss: float | None = None) -> None:
        """Move the bar on."""
        assert self._task is not None
        if loss is not None:
            self._loss = f"loss {loss:.3f}"
        self._progress.update(self._task, completed=done, loss=self._loss)
        if pace := self._pace.step(done):
            self.note("pace", _Pace.in_words(*pace))
        fifth = max(1, (self._total or _UNKNOWN) // 5)
        if not self._console.is_terminal and (done == self._total or done // fifth > self._done // fifth):
            left = self._progress.tasks[-1].time_remaining
            more = f", {duration(left)} left" if left else ""
            self.note("step", f"{self._stage}: {self._count(done)} {self._loss}".rstrip() + more)
        self._done = done

    def end(self) -> None:
        """The bar becomes a line: of many, rich would show the first and hide the one that moves."""
        if self._console.is_terminal and self._task is not None:
            took = duration(self._progress.tasks[-1].elapsed or 0)
            self._progress.remove_task(self._task)
            self.note("end", f"{self._stage}: {self._count(self._done)} {self._loss}".rstrip() + f", {took}")

    def _count(self, done: int) -> str:
        return f"step {done}" if self._total is None else f"{done}/{self._total}"
