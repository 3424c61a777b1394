"""What a patch's metadata says of its effect: the evaluation and the certificate, as typed data.

They are computed elsewhere (`train/evaluate.py`, `certify.py`); here is only their form and how it is read back
from a file that anybody may have written.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec

from ksl_patch.errors import PatchError

# A file may hold any number; what is drawn and compared is one that can be.
Number = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

# The figures of an evaluation in the order of its tables: name, what it is called, its format, is more better?
METRICS: dict[str, tuple[str, str, bool | None]] = {
    "loss": ("loss per target token", ".3f", False),
    "chrf": ("chrF++ raw", ".1f", True),
    "chrf_first_line": ("chrF++ first line", ".1f", True),
    "bleu": ("BLEU raw", ".1f", True),
    "bleu_first_line": ("BLEU first line", ".1f", True),
    "stop_rate": ("stops by itself", ".1%", True),
    "in_language": ("in the target language", ".1%", True),
    "characters": ("mean characters", ".0f", None),
}
# The systems in the order of the tables, and what each is.
SYSTEMS = {
    "base": "base",
    "embedding": "embedding tuned",
    "patch": "patch",
    "frequency": "most frequent rows",
    "l2": "largest L2 change",
    "random": "random rows",
    "single": "best single row",
    "noise": "random change, same norms",
}
CONTROLS = ("frequency", "l2", "random", "noise")
# What a p-value of a ticket is.
P_RANKS = (
    "ranks the rows and is no calibrated probability: values before and after are paired, and the test takes them to "
    "be independent"
)
_NAMED = 24  # rows in a sentence; tables have all of them
PARTS = {"dev": "dev", "held-out": "held-out", "given": "test"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two systems on the same pairs, and its paired bootstrap interval over them, where it has one."""

    value: Number
    low: Number | None = None
    high: Number | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a system's gain over the base in chrF++ comes from: raw = content + stopping.

    raw: the gain of the whole output. content: that of its first line. stopping: the rest, which is what follows the
    first line, and what it costs less than the base's.
    """

    raw: Difference
    content: Difference
    stopping: Difference


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of one system with the patch's own training seed, and how far it is from the base and the patch.

    low, high: the paired bootstrap interval of the difference from the base, over held-out pairs: it says nothing of
    other trainings. patch_minus: the patch's value minus this one. Both are None for what has none, the base or the
    patch itself. per_seed: the values with every training seed, this one first.
    """

    value: Number
    difference: Number | None = None
    low: Number | None = None
    high: Number | None = None
    per_seed: list[Number] = field(default_factory=list)
    patch_minus: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class SystemScores:
    """What one system got. rows: how many it changes, one number for each training seed.

    split: of its gain, None for the base and in files of before.
    """

    name: str
    rows: list[int]
    seeds: list[int]
    figures: dict[str, Figure]
    split: Split | None = None

    @property
    def label(self) -> str:
        """What it is called in tables and pictures."""
        return SYSTEMS.get(self.name, self.name)

    @property
    def size(self) -> str:
        """The number of its rows, one for each seed where they differ; empty for the base."""
        return "/".join(str(n) for n in dict.fromkeys(self.rows)) if any(self.rows) else ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out sentence, and what came out for it."""

    source: str
    reference: str
    base: str
    patch: str


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """How often a row of the patch is read in the pairs that were measured: in their prompts and reference answers.

    prompt: instruction and source together; the two are None where the tokenizer does not tell them apart. share: of
    the pairs whose prompt has it.
    """

    token_id: int
    token: str | None
    instruction: int | None
    source: int | None
    prompt: int
    answer: int
    share: Share


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures on pairs that trained nothing. A build writes the loss on its dev pairs, `ksl-patch eval` everything.

    data_digest: of the pairs. loss_base, loss_patch: per target token, in nats.
    signatures: sacrebleu's, by metric. notes: what a reader must know to read the figures.
    part: "dev" for the pairs that choices are made on, "held-out" for the others that the build set aside, "given" for
    another file's. documents: how many the intervals resample; None where pairs have none, and sentences are resampled.
    occurrences: of each row of the patch; None in files of before.
    """

    pairs: int
    data_digest: str
    loss_base: Number
    loss_patch: Number
    max_new_tokens: int | None = None
    confidence: Share | None = None
    resamples: int | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    systems: list[SystemScores] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    part: str | None = None
    documents: int | None = None
    occurrences: list[Occurrence] | None = None

    @property
    def what(self) -> str:
        """The pairs in words, such as "64 held-out pairs"."""
        return in_words(self.pairs, self.part)

    @property
    def ordered(self) -> list[SystemScores]:
        """The systems in the order of `SYSTEMS`, others behind them."""
        order = {name: place for place, name in enumerate(SYSTEMS)}
        return sorted(self.systems, key=lambda system: order.get(system.name, len(order)))

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that a system has, in the order of `METRICS`, and what they are called."""
        has = {name for system in self.systems for name in system.figures}
        return {name: label for name, (label, _, _) in METRICS.items() if name in has}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Agreements counted on fresh examples, and the one-sided lower bound of their share."""

    agreements: int
    examples: int
    share: Share
    lower: Share


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The heuristic of the KS margin.

    tau: the critical distance. certified: examples whose margin exceeds 2 tau. violations: those among them whose
    prediction did change. outside: rows that the patch leaves alone though they moved by tau or more.
    """

    alpha: Share
    tau: Number
    certified: int
    violations: int
    outside: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The three certificates of a patch against the fully tuned embedding; see `certify.py` for their assumptions.

    exact: inputs whose every token has the same row in both tables. part, notes: as in `Evaluation`.
    """

    pairs: int
    data_digest: str
    delta: Share
    max_new_tokens: int
    exact: int
    next_token: Bound
    continuation: Bound
    margin: Margin
    part: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def what(self) -> str:
        """The pairs in words, such as "64 held-out pairs"."""
        return in_words(self.pairs, self.part)


T = TypeVar("T", Evaluation, Certificate, SystemScores)


def read(kind: type[T], value: dict[str, Any] | None) -> T | None:
    """A patch's `evaluation` or `certificate` as what it is; None when it has none.

    Raises PatchError when it is something else.
    """
    if value is None:
        return None
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise PatchError(
            f"the patch's {kind.__name__.lower()} is not in the form that this ksl-patch writes ({error})."
        ) from error


def in_words(pairs: int, part: str | None) -> str:
    """So many pairs of a part."""
    return f"{pairs} {PARTS.get(part or '', 'held-out')} pairs"


def write(value: Evaluation | Certificate) -> dict[str, Any]:
    """The form that the metadata holds."""
    return asdict(value)


def show(metric: str, value: float, sign: str = "") -> str:
    """A metric's value in its format; nothing is "-0". sign: "+" for a difference."""
    text = format(value, sign + METRICS[metric][1])
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def interval(metric: str, figure: Figure) -> str:
    """The interval of a figure's difference from the base; empty where it has none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{show(metric, figure.low)} to {show(metric, figure.high)}"


def with_interval(metric: str, figure: Figure | None) -> str:
    """A figure and, in brackets, the interval of its difference from the base."""
    if figure is None:
        return ""
    between = interval(metric, figure)
    return show(metric, figure.value) + (f" ({between})" if between else "")


def from_base(metric: str, figure: Figure) -> str:
    """The difference of a figure from the base, and its interval in brackets; empty for the base."""
    if figure.difference is None:
        return ""
    return difference(metric, Difference(value=figure.difference, low=figure.low, high=figure.high))


def difference(metric: str, found: Difference) -> str:
    """A difference with its sign, and its interval in brackets where it has one."""
    between = (
        ""
        if found.low is None or found.high is None
        else f" ({signed(metric, found.low)} to {signed(metric, found.high)})"
    )
    return signed(metric, found.value) + between


def against(metric: str, figure: Figure | None) -> str:
    """The patch's value minus this system's, and its interval in brackets; empty where there is none."""
    if figure is None or figure.patch_minus is None:
        return ""
    return difference(metric, figure.patch_minus)


def where_from(evaluation: Evaluation) -> str:
    """In a sentence, how much of the patch's gain in chrF++ is content and how much stopping; empty where unknown."""
    split = next((system.split for system in evaluation.systems if system.name == "patch"), None)
    if split is None:
        return ""
    raw, content, stopping = (difference("chrf", part) for part in (split.raw, split.content, split.stopping))
    return (
        f"Of the patch's {raw} chrF++ raw, {content} are content (the first line) and {stopping} stopping (what "
        "follows the first line)."
    )


def which_occur(evaluation: Evaluation) -> str:
    """In a sentence, which rows of the patch occur in no prompt that was measured; empty where unknown."""
    rows = evaluation.occurrences
    if not rows:
        return ""
    absent = [repr(row.token) if row.token is not None else str(row.token_id) for row in rows if not row.prompt]
    if not absent:
        return f"Each row occurs in at least one of the {evaluation.pairs} prompts."
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    occur = "occurs" if len(absent) == 1 else "occur"
    nowhere = sum(not row.prompt and not row.answer for row in rows)
    return (
        f"{len(absent)} of {len(rows)} rows {occur} in none of the {evaluation.pairs} prompts: "
        f"{', '.join(absent[:_NAMED])}{more}; {nowhere or 'none'} of these in no reference answer either."
    )


def occurrence_table(evaluation: Evaluation | None) -> tuple[list[str], dict[int, list[str]]]:
    """What is said of rows' occurrences: the columns' names, and the cells by token id; empty where unknown."""
    rows = (evaluation and evaluation.occurrences) or []
    if not rows:
        return [], {}
    parts = ["prompt", "answer"] if any(row.source is None for row in rows) else ["instruction", "source", "answer"]
    cells = {row.token_id: [*(str(getattr(row, part)) for part in parts), f"{row.share:.0%}"] for row in rows}
    return [*parts, "of prompts"], cells


def of_seeds(metric: str, figure: Figure | None) -> str:
    """The smallest and largest value over training seeds; empty where there is one."""
    if figure is None or len(figure.per_seed) < 2:
        return ""
    return f"{show(metric, min(figure.per_seed))} to {show(metric, max(figure.per_seed))}"


def signed(metric: str, value: float) -> str:
    """A difference in a metric's format, with its sign."""
    return show(metric, value, "+")
