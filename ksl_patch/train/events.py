"""A training's events for a reporter, its interrupts, and the mark of a finished checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ksl_patch.errors import RunError
from ksl_patch.train.progress import Reporter
from ksl_patch.train.record import keep

COMPLETE = "complete"  # a file of a checkpoint


class Events(TrainerCallback):  # type: ignore[misc]
    """Passes the Trainer's events on, stops at a loss that is no number, and marks finished checkpoints."""

    def __init__(self, stage: str, reporter: Reporter, later: int | None, *, ends_by_itself: bool = False) -> None:
        self._stage, self._reporter, self._later, self._ends_by_itself = stage, reporter, later, ends_by_itself
        self.interrupted = False

    def interrupt(self) -> None:
        """Stop at the end of this step."""
        self.interrupted = True
        with suppress(OSError):  # a terminal that is gone
            self._reporter.note("stopping", "Stopping at the end of this step, which is kept ...")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where that was asked for."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A bar begins."""
        if state.is_world_process_zero:
            self._reporter.begin(self._stage, None if self._ends_by_itself else state.max_steps, self._later)
            if state.global_step:
                self._reporter.note(
                    "resumed", f"{self._stage}: continues at step {state.global_step}", step=state.global_step
                )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """A step is done. Raises RunError for a loss that is no number."""
        if logs and "loss" in logs:
            loss = logs["loss"]
            if loss != loss:
                raise RunError(
                    f"{self._stage}: the loss is not a number any more at step {state.global_step}; "
                    "lower the learning rate."
                )
            if state.is_world_process_zero:
                self._reporter.step(state.global_step, loss)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint."""
        if state.is_world_process_zero:
            # A kill may leave a checkpoint half written; only a marked one is ever continued from.
            keep(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, b"")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The bar ends."""
        if not state.is_world_process_zero:
            return
        if state.global_step >= state.max_steps or not self.interrupted:
            self._reporter.end()
        else:
            message = f"{self._stage}: stopped at {state.global_step}/{state.max_steps}, which is kept"
            self._reporter.note("stopped", message, step=state.global_step)
