"""What a patch says of itself besides its tensors: the types of its metadata, and what they hold in words."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from ksl_patch.base import BaseIdentity
from ksl_patch.errors import PatchError

DEFAULT_ALPHA = 0.05  # the level of the test where nobody names one
Side = Literal["input", "input+output"]
Scope = Literal["all", "prompt"]


@dataclass(frozen=True, kw_only=True)
class TemplateMeta:
    """The prompt a patch was trained with. `text` holds `{source}` once; the answer follows the text.

    chat: the text is a rendered chat template, so it brings its own special tokens and none are added.
    fields: what else is filled in, such as "context" for `{context}`; other braces are only text.
    end_token_id: what ends an answer, where it is not the tokenizer's own end of sequence: a chat's end of a turn.
    before_answer: white space that the chat template puts before an answer, and the model writes.
    unpatched: the prompt's text for the base alone, without reserved tokens; None where that is `text`.
    """

    text: str
    chat: bool
    fields: list[str] | None = None
    end_token_id: int | None = None
    before_answer: str | None = None
    unpatched: str | None = None

    def of_base(self) -> TemplateMeta:
        """The template as somebody without the patch would have it, which a base is compared in."""
        return self if self.unpatched is None else replace(self, text=self.unpatched, unpatched=None)

    def pieces(self) -> list[str]:
        """The text and, at every odd place, the name of what is filled in between: "source" or a field."""
        names = "|".join(map(re.escape, ["source", *(self.fields or ())]))
        return re.split(rf"\{{({names})\}}", self.text)

    def render(self, source: str, /, **fields: str) -> str:
        """The prompt for one source sentence and the template's fields. Raises PatchError when one is missing."""
        missing = [name for name in self.fields or () if name not in fields]
        if missing:
            raise PatchError(
                f"the prompt template needs {', '.join(map(repr, missing))} beside the sentence: give the whole prompt."
            )
        values = {**fields, "source": source}
        return "".join(values[piece] if i % 2 else piece for i, piece in enumerate(self.pieces()))

    def matches(self, prompt: str) -> bool:
        """Whether a prompt could have come from this template."""
        first, *between, last = self.pieces()[::2]
        if not prompt.startswith(first) or not prompt.endswith(last):
            return False
        at, end = len(first), len(prompt) - len(last)
        for text in between:
            at = prompt.find(text, at, end)
            if at < 0:
                return False
            at += len(text)
        return at <= end


@dataclass(frozen=True, kw_only=True)
class TicketMeta:
    """How the token ids were selected.

    test, statistic and pvalue (per id, in the order of `token_ids`) are None for a selection without a test.
    """

    selection: str
    test: str | None
    alpha: float | None
    top_k: int | None
    statistic: list[float] | None
    pvalue: list[float] | None

    @property
    def level(self) -> float:
        """The level by which a row of it moved or did not, also where the ticket was chosen without one."""
        return self.alpha or DEFAULT_ALPHA

    @property
    def rule(self) -> str:
        """The selection in words, such as "ks (p < 0.05, at most 32)"."""
        limits = [f"p < {self.alpha:g}"] if self.alpha else []
        most = "at most " if self.selection == "ks" else ""
        limits += [f"{most}{self.top_k}"] if self.top_k else []
        return f"{self.selection} ({', '.join(limits)})" if limits else self.selection


@dataclass(frozen=True, kw_only=True)
class TrainingMeta:
    """How the rows were trained; embed_ is the embedding tuning before the test.

    batch_size: pairs in a step, over all processes. pairs: how many there were to train on; pairs_read and
    embed_pairs_read: how many of them a step read. embedding_scale: standard deviation of the table's values; a
    learning rate divided by it is relative. hyperparameters: all others, by transformers' names for them.
    sources: hashes of the sentences that were read, in base64 (`data/sketch.py`), so that tests can be kept apart.
    """

    mode: str
    steps: int
    lr: float
    optimiser: str
    batch_size: int
    seed: int
    data_digest: str
    pairs: int
    embed_steps: int
    embed_lr: float
    embedding_scale: float
    pairs_read: int | None = None
    embed_pairs_read: int | None = None
    processes: int | None = None
    hyperparameters: dict[str, int | float | str | bool] | None = None
    sources: str | None = None

    @property
    def read(self) -> str:
        """What the rows' own tuning read, such as "800 of 1,900 pairs (100 steps x 8)"."""
        steps, read = (self.steps, self.pairs_read) if self.steps else (self.embed_steps, self.embed_pairs_read)
        of = f"{self.pairs:,} pairs" if read is None else f"{read:,} of {self.pairs:,} pairs"
        return f"{of} ({steps:,} steps x {self.batch_size})"

    @property
    def tunings(self) -> str:
        """Which tunings there were, such as "100 steps of the rows at learning rate 0.00611"."""
        each = [("embedding", self.embed_steps, self.embed_lr), ("rows", self.steps, self.lr)]
        return ", ".join(f"{steps} steps of the {what} at learning rate {lr:.3g}" for what, steps, lr in each if steps)

    @property
    def settings(self) -> str:
        """The other hyper-parameters in words; empty where they are not known."""
        return ", ".join(f"{name} {value}" for name, value in (self.hyperparameters or {}).items())


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The patch that some rows of a merged one came from."""

    name: str
    digest: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class PatchMeta:
    """Everything a patch file says besides its tensors.

    tokens: the text of each token id, for people to read. origin: where the rows of a merged patch came from.
    """

    name: str
    language: str | None
    base: BaseIdentity
    tokens: list[str] | None
    side: Side
    scope: Scope
    template: TemplateMeta | None
    ticket: TicketMeta | None
    training: TrainingMeta | None
    evaluation: dict[str, Any] | None
    certificate: dict[str, Any] | None
    licence: str | None
    created: str | None
    origin: list[Origin] | None = None


def typed(meta: PatchMeta) -> PatchMeta:
    """The metadata as a file would give it back, so that its types are checked before it is used."""
    try:
        return msgspec.json.decode(msgspec.json.encode(meta), type=PatchMeta)
    except (msgspec.DecodeError, UnicodeEncodeError, TypeError) as error:
        raise PatchError(f"the metadata is not valid ({error}).") from error


def timestamp() -> str:
    """Now, or SOURCE_DATE_EPOCH when it is set (reproducible builds), as ISO 8601 in UTC."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch else datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")
