"""The settings of a build: everything that its patch depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ksl_patch.patch import Scope, Side
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.ticket import DEFAULT_CAP, Selection

Mode = Literal["partial", "transfer"]
Start = Literal["text", "base"]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything a build depends on. Learning rates are in units of the standard deviation of the table's values.

    pairs: what `read_pairs` takes. strict: a line that is no pair is an error, and not left out.
    rows: tokens named by hand, ids or texts, in place of a selection. start: of the reserved rows, the base's
    rows of the instruction's tokens or their own. beside: references of patches whose tokens are left alone by the
    selection "reserved". group: the pairs' column with their document.
    data_seed: of the split into training, dev and held-out pairs. damp_rare: of the embedding tuning, see
    `TuneSettings`. base_model: the base's id on the Hub, where it is a folder.
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
    lr: float = 0.15
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
