"""What a patch's file records of its effect, and the names of metrics and systems; computed in evidence/.

How they are computed is evidence/'s, how they are said in words wording.py's.
"""

from __future__ import annotations

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
    "touched": ("of 1,000 tokens of other text, changed", ".0f", False),
    "other_loss": ("loss per token of other text", ".3f", False),
    "other_same": ("other prompts answered as by the base", ".0%", True),
}
# The systems in the order of the tables, and what each is.
SYSTEMS = {
    "base": "base",
    "embedding": "embedding tuned",
    "patch": "patch",
    "ks": "largest KS distance",
    "frequency": "most frequent rows",
    "l2": "largest L2 change",
    "random": "random rows",
    "single": "best single row",
    "reserved": "reserved rows",
    "noise": "random change, same norms",
}
CONTROLS = ("ks", "frequency", "l2", "random", "reserved", "noise")
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
class Elsewhere:
    """What a patch does to text that is not its task: a sample in several languages, and other prompts.

    reserved: whether all its tokens are such that no text has them, and the head is left alone: it is harmless outside
    its template then. tokens: of the sample; touched: those of them that the patch has rows of, or all, of one that
    changes the head. equal: texts whose loss is the base's to the last bit. loss_base, loss_patch: per token of the
    sample, in nats. prompts: how many others were answered, same: with the base's own tokens. None: not measured.
    """

    reserved: bool
    languages: int
    tokens: int
    touched: int
    equal: int | None = None
    loss_base: Number | None = None
    loss_patch: Number | None = None
    prompts: int | None = None
    same: int | None = None

    @property
    def per_thousand(self) -> float:
        """Tokens of the sample that the patch changes, of a thousand."""
        return 1000 * self.touched / max(1, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures on pairs that trained nothing. A build writes the loss on its dev pairs, `ksl-patch eval` everything.

    data_digest: of the pairs. loss_base, loss_patch: per target token, in nats.
    signatures: sacrebleu's, by metric. notes: what a reader must know to read the figures.
    part: "dev" for the pairs that choices are made on, "held-out" for the others that the build set aside, "given" for
    another file's. documents: how many the intervals resample; None where pairs have none, and sentences are resampled.
    occurrences: of each row of the patch; elsewhere: what it does to other text. None in files of before.
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
    elsewhere: Elsewhere | None = None

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
    """What can be certified of a patch; `evidence/certificate.py` has the assumptions.

    exact, next_token, continuation, margin: its agreement with the tuned embedding, None for reserved rows, which come
    from none. exact: inputs whose every token has the same row in both tables. part, notes: as in `Evaluation`.
    elsewhere: what it does outside its template; None in files of before.
    """

    pairs: int
    data_digest: str
    delta: Share
    max_new_tokens: int
    exact: int | None
    next_token: Bound | None
    continuation: Bound | None
    margin: Margin | None
    part: str | None = None
    notes: list[str] = field(default_factory=list)
    elsewhere: Elsewhere | None = None

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
