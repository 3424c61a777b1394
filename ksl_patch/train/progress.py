"""What a build tells while it runs: bars for people, JSON lines for programs, nothing for a library's user."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ksl_patch.terminal import PlainConsole


class Reporter(Protocol):
    """Receives a build's events."""

    def note(self, event: str, message: str, **values: Any) -> None:
        """Something worth saying once."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, done: int, loss: float | None = None) -> None:
        """`done` steps of the stage are done; loss is per answer token, in nats."""

    def end(self) -> None:
        """The stage is over."""


class SilentReporter:
    """Says nothing."""

    def note(self, event: str, message: str, **values: Any) -> None:
        """Say nothing."""

    def begin(self, stage: str, total: int) -> None:
        """Say nothing."""

    def step(self, done: int, loss: float | None = None) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


class JsonReporter:
    """One JSON object a line on standard output."""

    def __init__(self) -> None:
        self._stage = ""
        self._total = 0

    def note(self, event: str, message: str, **values: Any) -> None:
        """{"event": event, "message": ..., ...}."""
        self._print(event=event, message=message, **values)

    def begin(self, stage: str, total: int) -> None:
        """{"event": "begin", "stage": ..., "steps": ...}."""
        self._stage, self._total = stage, total
        self._print(event="begin", stage=stage, steps=total)

    def step(self, done: int, loss: float | None = None) -> None:
        """{"event": "step", "stage": ..., "step": ..., "steps": ..., "loss": ...}."""
        self._print(event="step", stage=self._stage, step=done, steps=self._total, loss=loss)

    def end(self) -> None:
        """{"event": "end", "stage": ...}."""
        self._print(event="end", stage=self._stage)

    def _print(self, **values: Any) -> None:
        print(json.dumps(values, ensure_ascii=False), flush=True)


class RichReporter:
    """Progress bars with the loss and the time left, on standard error; plain lines where that is no terminal."""

    def __init__(self, console: PlainConsole | None = None) -> None:
        self._console = console or PlainConsole(stderr=True)
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
        self._stage, self._total, self._loss = "", 0, ""

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, event: str, message: str, **values: Any) -> None:
        """A line above the bars."""
        self._console.print(message, soft_wrap=True)

    def begin(self, stage: str, total: int) -> None:
        """A new bar."""
        self._stage, self._total, self._loss = stage, total, ""
        self._task = self._progress.add_task(stage, total=total, loss="")

    def step(self, done: int, loss: float | None = None) -> None:
        """Move the bar on."""
        assert self._task is not None
        if loss is not None:
            self._loss = f"loss {loss:.3f}"
        self._progress.update(self._task, completed=done, loss=self._loss)
        if not self._console.is_terminal and loss is not None and (done % max(1, self._total // 5) == 0):
            self.note("step", f"{self._stage}: {done}/{self._total} {self._loss}")

    def end(self) -> None:
        """The bar stays as it is."""
