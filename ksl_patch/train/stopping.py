"""When a tuning of rows has had enough steps: the rows' running average, and the loss on validation pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ksl_patch.data.encoding import Example
from ksl_patch.errors import RunError
from ksl_patch.train.progress import Reporter
from ksl_patch.train.record import keep

EVERY = 20  # steps between two looks at the validation pairs
_FALL = 0.002  # nats per token that count as better
_SHARE = 1 / 3  # of the steps, in which the loss has not fallen when it is enough
_DECAY = 8  # of the average, whose weights grow with that power of the step
_FILE = "average.safetensors"


@dataclass(frozen=True)
class Validation:
    """What a tuning stops by. digest: of the pairs."""

    examples: Sequence[Example]
    digest: str

    def key(self) -> dict[str, Any]:
        """What a tuning's result depends on."""
        return {"pairs": self.digest, "every": EVERY, "fall": _FALL, "share": _SHARE, "decay": _DECAY}


def best_step(losses: Iterable[Sequence[float]]) -> int:
    """Of steps and their losses, the step of the lowest, of equal ones the first."""
    return int(min(losses, key=lambda each: each[1])[0])


class BestAverage(TrainerCallback):  # type: ignore[misc]
    """Averages the rows over the steps, and ends the training when the average's validation loss falls no more.

    The average stands in for a learning rate that falls, whose end would have to be known: it forgets the first steps
    as it goes (polynomial-decay averaging, Shamir and Zhang, "Stochastic Gradient Descent for
    Non-smooth Optimization", 2013). rows: float32 [k, d], in training. loss: of the model as it is.
    """

    def __init__(self, rows: nn.Parameter, loss: Callable[[], float], reporter: Reporter, stage: str) -> None:
        self._rows, self._loss, self._reporter, self._stage = rows, loss, reporter, stage
        self.average = rows.detach().clone()
        self.best = self.average.clone()
        self.losses: list[tuple[int, float]] = []

    @property
    def has_stalled(self) -> bool:
        """Whether the loss has not fallen enough in the last third of the steps."""
        if not self.losses:
            return False
        fell, lowest = 0, float("inf")
        for step, loss in self.losses:
            if loss < lowest - _FALL:
                fell, lowest = step, loss
        now = self.losses[-1][0]
        return now - fell >= max(2 * EVERY, now * _SHARE)

    def result(self) -> dict[str, torch.Tensor]:
        """The rows of the lowest loss, float32 [k, d], and of each look its step and loss, float64 [n, 2]."""
        step, last = best_step(self.losses), self.losses[-1][0]
        lowest = dict(self.losses)[step]
        message = f"{self._stage}: the rows are those of step {step} of {last}, validation loss {lowest:.4f}"
        self._reporter.note("best", message, step=step, steps=last, loss=lowest)
        return {"rows": self.best, "losses": self._losses()}

    def _losses(self) -> torch.Tensor:
        return torch.tensor(self.losses, dtype=torch.float64).reshape(-1, 2)

    def resume(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint holds."""
        saved = safetensors.torch.load_file(checkpoint / _FILE)
        self.average, self.best = (saved[name].to(self._rows.device) for name in ("average", "best"))
        self.losses = [(int(each[0]), each[1]) for each in saved["losses"].tolist()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Average, look, and say when it is enough."""
        step = state.global_step
        self.average.lerp_(self._rows.detach(), (_DECAY + 1) / (step + _DECAY))
        if step % EVERY and step < state.max_steps:
            return
        here = self._rows.detach().clone()
        with torch.no_grad():
            self._rows.copy_(self.average)
            try:
                loss = self._loss()
            except RunError as error:
                raise RunError(f"{self._stage}, step {step}: {error} Lower the learning rate.") from error
            self._rows.copy_(here)
        if not self.losses or loss < min(loss for _, loss in self.losses):
            self.best = self.average.clone()
        self.losses.append((step, loss))
        if state.is_world_process_zero:
            best = ", the lowest so far" if best_step(self.losses) == step else ""
            self._reporter.note(
                "validation",
                f"{self._stage}: validation loss {loss:.4f} at step {step}{best}",
                step=step,
                loss=loss,
            )
        if self.has_stalled:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep beside a checkpoint what it goes on from."""
        if state.is_world_process_zero:
            content = safetensors.torch.save({"average": self.average, "best": self.best, "losses": self._losses()})
            keep(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE, content)
