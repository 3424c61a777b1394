"""The settings of a build: everything that its patch depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ksl_patch.patch import Scope, Side
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.ticket import DEFAULT_CAP, Selection

Mode = Literal["partial", "transfer"]
Start = Literal["text", "base"]
Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything a build depends on. Learning rates are in units of the standard deviation of the table's values.

    pairs: what `read_pairs` takes. strict: a line that is no pair is an error, and not left out. rows: tokens named
    by hand, ids or texts, in place of a selection. start: of the reserved rows, the base's rows of the instruction's
    tokens or their own. beside: references of patches whose tokens are left alone by the selection "reserved". group:
    the pairs' column with their document. data_seed: of the split into training, validation, dev and held-out pairs.
    damp_rare: of the embedding tuning, see `TuneSettings`. base_model: the base's id on the Hub, where it is a
    folder. auto_steps: the rows' tuning ends when the loss on `validation` pairs, which nothing else uses, falls no
    more, after `steps` at most; its learning rate stays. epochs, embed_epochs: how often each pair is read, in place
    of steps. schedule: how learning rates fall to 0; warmup: the share of the steps in which they rise before.
    absolute_lr: learning rates are the optimiser's, in no unit.
    """

    base: str
    pairs: str | tuple[str, ...]
    language: str
    name: str
    revision: str | None = None
    source_language: str = "en"
    columns: tuple[str, str] = ("source", "target")
    group: str | None = None
    strict: bool = False
    template: str = "plain"
    system: str | None = None
    alpha: float | None = DEFAULT_ALPHA
    top_k: int | None = None
    cap: int = DEFAULT_CAP
    selection: Selection = "ks"
    rows: tuple[str | int, ...] = ()
    start: Start = "text"
    beside: tuple[str, ...] = ()
    mode: Mode = "partial"
    side: Side = "input"
    scope: Scope = "all"
    embed_steps: int = 100
    embed_lr: float = 0.15
    damp_rare: bool = True
    steps: int = 100
    auto_steps: bool = False
    validation: int = 64
    lr: float = 0.15
    epochs: float | None = None
    embed_epochs: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.0
    absolute_lr: bool = False
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    data_seed: int = 0
    dev: int = 64
    held_out: int = 64
    max_pairs: int | None = None
    max_length: int = 256
    checkpoint_every: int = 25
    gradient_checkpointing: bool = False
    licence: str | None = None
    device: str | None = None
    base_model: str | None = None

    @property
    def validation_pairs(self) -> int:
        """Pairs that the rows' tuning ends by."""
        return self.validation if self.auto_steps else 0

    @property
    def most_read(self) -> int | None:
        """Pairs that are read of a source of any length: those that are too long, and repeated sources, are left out.

        The same with validation pairs as without, where that is enough, so that the same pairs are held out.
        """
        if self.max_pairs is None:
            return None
        wanted = self.max_pairs + self.dev + self.held_out
        return max(2 * wanted, wanted + self.validation_pairs)

    @property
    def rule(self) -> Selection:
        """What its rows are chosen by."""
        return "given" if self.rows else self.selection

    def trains(self, selection: Selection | Literal["all"]) -> tuple[bool, bool]:
        """Whether rows of a selection come from a tuning of the embedding, and whether from one of their own."""
        alone = self.mode == "partial" and selection != "all"
        return not alone or selection in ("ks", "l2"), alone

    def rates(self, *, rows: bool) -> dict[str, Any]:
        """How the learning rate of a tuning changes, of the rows or of the embedding: schedule and warmup."""
        if rows and self.auto_steps:
            return {"schedule": "constant", "warmup": 0.0}
        return {"schedule": self.schedule, "warmup": self.warmup}

    def resolved(self, pairs: int, batch: int, scale: float) -> BuildConfig:
        """The same with steps in place of epochs, and learning rates in the unit of others.

        pairs: to train on. batch: pairs in a step. scale: the standard deviation of the table's values.
        """
        unit = scale if self.absolute_lr else 1.0
        steps, embed_steps = (
            given if epochs is None else max(1, math.ceil(epochs * pairs / batch))
            for given, epochs in ((self.steps, self.epochs), (self.embed_steps, self.embed_epochs))
        )
        return replace(
            self,
            steps=steps,
            embed_steps=embed_steps,
            lr=self.lr / unit,
            embed_lr=self.embed_lr / unit,
            epochs=None,
            embed_epochs=None,
            absolute_lr=False,
        )
