"""What a fleet's builds tell: a table that moves for people, lines with the patch's name, or JSON lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ksl_patch.terminal import PlainConsole
from ksl_patch.train.fleet import Outcome
from ksl_patch.train.progress import JsonReporter, RichReporter, duration

_QUIET = {
    "pairs", "start", "loading", "reused", "testing", "measuring", "dev", "ticket", "pace", "end", "base_model",
    "validation",
}  # fmt: skip


class NamedLines(RichReporter):
    """A build's lines with its patch's name, where there is no terminal."""

    def __init__(self, name: str, console: PlainConsole) -> None:
        super().__init__(console)
        self._name = name

    def note(self, event: str, message: str, **values: Any) -> None:
        """A line."""
        super().note(event, f"{self._name}: {message}", **values)


class NamedJson(JsonReporter):
    """A build's JSON lines, each with "patch"."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _print(self, **values: Any) -> None:
        super()._print(patch=self._name, **values)


class FleetTable:
    """A row for each patch, which moves as its build does; what is worth saying stands above it."""

    def __init__(self, names: Sequence[str], console: PlainConsole) -> None:
        self.rows = {name: Row(name, self) for name in names}
        self._console = console
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=4)

    def __enter__(self) -> FleetTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text)

    def done(self, outcome: Outcome) -> None:
        """The row's end."""
        self.rows[outcome.name].outcome = outcome

    def table(self) -> Table:
        """As it stands."""
        done = sum(row.outcome is not None for row in self.rows.values())
        result = outcome_table(f"{done} of {len(self.rows)} patches")
        for row in self.rows.values():
            result.add_row(*row.cells())
        return result


def outcome_table(title: str) -> Table:
    """An empty table of a fleet."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("patch", "", "rows", "dev loss: base", "patch", "time"):
        result.add_column(name, justify="left" if name in ("patch", "") and not result.columns[1:] else "right")
    return result


def outcome_cells(outcome: Outcome) -> tuple[Text | str, ...]:
    """A member's row once it is done."""
    losses = ["" if loss is None else f"{loss:.3f}" for loss in (outcome.loss_base, outcome.loss_patch)]
    state = Text(outcome.state, style="red" if outcome.state == "failed" else "green")
    return Text(outcome.name), state, str(outcome.rows or ""), *losses, duration(outcome.seconds)


class Row:
    """One build's row; a reporter of its build."""

    def __init__(self, name: str, table: FleetTable) -> None:
        self.outcome: Outcome | None = None
        self._name, self._table = name, table
        self._state, self._began = "waits", 0.0
        self._stage, self._total, self._rows = "", 0, ""

    def begins(self) -> Row:
        """The build begins now."""
        self._state, self._began = "begins", time.monotonic()
        return self

    def cells(self) -> tuple[Text | str, ...]:
        """The row as it stands."""
        if self.outcome is not None:
            return outcome_cells(self.outcome)
        took = duration(time.monotonic() - self._began) if self._began else ""
        return Text(self._name), self._state, self._rows, "", "", took

    def note(self, event: str, message: str, **values: Any) -> None:
        """A line above the table, but for what every build says."""
        if event == "ticket":
            self._rows = str(len(values["token_ids"]))
        if event not in _QUIET:
            self._table.say(f"{self._name}: {message}")

    def doubt(self, event: str, message: str, **values: Any) -> None:
        """A line: nobody is asked."""
        self.note(event, f"Warning: {message}")

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        """A stage begins."""
        self._stage, self._of = stage, "" if total is None else f"/{total}"
        self._state = f"{stage} 0{self._of}"

    def step(self, done: int, loss: float | None = None) -> None:
        """How far it is."""
        self._state = f"{self._stage} {done}{self._of}" + ("" if loss is None else f", loss {loss:.3f}")

    def end(self) -> None:
        """The stage is over."""
        self._state = "measures"
