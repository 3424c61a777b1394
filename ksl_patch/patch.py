"""The patch: token ids, replacement rows and what is known of them, and its one-file form.

File format (docs/format.md): one safetensors file with the tensors below and the metadata key
`ksl_patch`, a JSON object {"format_version", "checksum", "meta"}.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ksl_patch.base import BaseIdentity, EmbeddingTable, check_base, find_embedding, identify
from ksl_patch.base.digest import tokenizer_digest
from ksl_patch.base.identity import Table, has_other_weights
from ksl_patch.base.tensors import dtype_name, tensor_bytes
from ksl_patch.errors import BaseMismatchError, OtherBodyWarning, OtherVocabularyWarning, PatchError

FORMAT_VERSION = 1
_MAX_HEADER = 16 * 2**20  # parsed JSON takes many times its text in memory
Side = Literal["input", "input+output"]
Scope = Literal["all", "prompt"]

_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MAX_FIELDS = 16
# RFC 5646: language, script, region, variants, extensions and private use; well-formed, not registered.
_LANGUAGE = re.compile(
    r"[A-Za-z]{2,8}(-[A-Za-z]{3}){0,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|\d{3}))?(-([A-Za-z0-9]{5,8}|\d[A-Za-z0-9]{3}))*"
    r"(-[A-WY-Za-wy-z0-9](-[A-Za-z0-9]{2,8})+)*(-x(-[A-Za-z0-9]{1,8})+)?"
)


@dataclass(frozen=True, kw_only=True)
class TemplateMeta:
    """The prompt a patch was trained with. `text` holds `{source}` once; the answer follows the text.

    chat: the text is a rendered chat template, so it brings its own special tokens and none are added.
    fields: what else is filled in, such as "context" for `{context}`; other braces are only text.
    end_token_id: what ends an answer, where it is not the tokenizer's own end of sequence: a chat's end of a turn.
    before_answer: white space that the chat template puts before an answer, and the model writes.
    """

    text: str
    chat: bool
    fields: list[str] | None = None
    end_token_id: int | None = None
    before_answer: str | None = None

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
    def rule(self) -> str:
        """The selection in words, such as "ks (p < 0.05, at most 32)"."""
        limits = [f"p < {self.alpha:g}"] if self.alpha else []
        limits += [f"at most {self.top_k}"] if self.top_k else []
        return f"{self.selection} ({', '.join(limits)})" if limits else self.selection


@dataclass(frozen=True, kw_only=True)
class TrainingMeta:
    """How the rows were trained; embed_ is the embedding tuning before the test.

    batch_size: pairs in a step, over all processes. pairs: how many there were to train on; pairs_read and
    embed_pairs_read: how many of them a step read. embedding_scale: standard deviation of the table's values; a
    learning rate divided by it is relative. hyperparameters: all others, by transformers' names for them.
    sources: hashes of the sentences that were read, in base64 (`train/data.py`), so that tests can be kept apart.
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


# Fields that came later: a file without them has the bytes, and the checksum, that it always had.
_LATER = {
    "base": ("body",),
    "template": ("fields", "end_token_id", "before_answer"),
    "training": ("pairs_read", "embed_pairs_read", "processes", "hyperparameters", "sources"),
}


class _FileMeta(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    checksum: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    meta: PatchMeta


class _FormatOnly(msgspec.Struct):
    format_version: int


@dataclass(frozen=True, eq=False)
class Patch:
    """A handful of replacement rows for one base. Immutable; valid from construction on.

    token_ids: int64 [k], sorted, unique.
    rows: [k, d], the absolute values that replace the base's rows at `token_ids`.
    base_rows: [k, d], the rows they replace, in the same dtype.
    output_rows: [k, d] for the head, only with side="input+output"; None there means `rows`.
    Raises PatchError when anything does not fit together.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    base_rows: torch.Tensor
    meta: PatchMeta
    output_rows: torch.Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", _typed(self.meta))
        _check_tensors(self)
        _check_meta(self)

    def __repr__(self) -> str:
        k, d = self.rows.shape
        return f"Patch({self.meta.name!r}, {k} rows of {d}, {dtype_name(self.rows.dtype)}, {self.digest[:12]})"

    @classmethod
    def from_model(
        cls,
        model: Any,
        token_ids: torch.Tensor | list[int],
        rows: torch.Tensor,
        *,
        name: str,
        language: str | None = None,
        tokenizer: Any = None,
        output_rows: torch.Tensor | None = None,
        side: Side = "input",
        scope: Scope = "all",
        template: TemplateMeta | None = None,
        licence: str | None = None,
        created: str | None = None,
    ) -> Patch:
        """A patch whose base rows and base identity come from a loaded transformers model.

        token_ids: k ids in any order, unique; rows: [k, d] in the same order, cast to the table's dtype.
        Raises PatchError when the ids or rows do not fit the model, BaseMismatchError when the model has
        no table to patch.
        """
        table = find_embedding(model)
        ids = torch.as_tensor(token_ids).cpu()
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise PatchError(f"token_ids must be a list of integers, not {list(ids.shape)} of {dtype_name(ids.dtype)}.")
        ids, order = ids.long().sort()
        _check_ids(ids, table.weight.shape[0])

        def ordered(values: torch.Tensor, what: str) -> torch.Tensor:
            if values.ndim != 2 or len(values) != len(ids):
                raise PatchError(f"{what} must be [{len(ids)}, d], one row per token id, not {list(values.shape)}.")
            return values.detach().cpu()[order].to(table.weight.dtype).contiguous()

        return cls(
            token_ids=ids,
            rows=ordered(rows, "rows"),
            base_rows=table.weight.detach()[ids.to(table.weight.device)].cpu(),
            output_rows=None if output_rows is None else ordered(output_rows, "output_rows"),
            meta=PatchMeta(
                name=name,
                language=language,
                base=identify(model, tokenizer),
                tokens=None if tokenizer is None else [token_text(tokenizer, index) for index in ids.tolist()],
                side=side,
                scope=scope,
                template=template,
                ticket=None,
                training=None,
                evaluation=None,
                certificate=None,
                licence=licence,
                created=created,
            ),
        )

    def with_meta(self, **changes: Any) -> Patch:
        """The same rows with some metadata fields replaced."""
        return replace(self, meta=replace(self.meta, **changes))

    def check(self, model: Any, tokenizer: Any = None) -> None:
        """Raise BaseMismatchError unless `model` (and `tokenizer`) is the base of this patch.

        Warns with OtherBodyWarning when the patch's rows are the base's and other weights are not, and with
        OtherVocabularyWarning when the patch's tokens are the base's and others are not.
        """
        self.check_table(find_embedding(model))
        if tokenizer is not None:
            self.check_vocabulary(tokenizer)
        self.check_body(model)

    def check_body(
        self,
        model: Any,
        digest: Callable[[torch.dtype], tuple[str, str | None] | None] | None = None,
        stacklevel: int = 3,
    ) -> None:
        """Warn with OtherBodyWarning when the model has other weights beside these rows than the patch's base."""
        if has_other_weights(self.meta.base, model, digest):
            warnings.warn(
                f"{self.meta.name} was made for another model that has the same rows (this one may be a fine-tune, or "
                "have merged adapters): it works on this one, but what was measured of it need not hold here.",
                OtherBodyWarning,
                stacklevel=stacklevel,
            )

    def check_table(self, table: Table) -> None:
        """The same for a model's table, where it is at hand."""
        check_base(self.meta.base, self.token_ids, self.base_rows, table)

    def check_vocabulary(self, tokenizer: Any, digest: str | None = None, stacklevel: int = 3) -> None:
        """Raise BaseMismatchError where the patch's ids are other tokens of this tokenizer than in training.

        digest: its `tokenizer_digest`, where that is known. A tokenizer that is another elsewhere alone, for an added
        token, say, is good enough, and warned of with OtherVocabularyWarning.
        """
        made_with, own = self.meta.base.tokenizer_digest, digest or tokenizer_digest(tokenizer)
        if made_with is None or own == made_with:
            return
        other = f"the tokenizer's vocabulary (sha256 {own[:12]}...) is not the one the patch was made with"
        if self.meta.tokens is None:
            raise BaseMismatchError(
                f"{other} ({made_with[:12]}...), and the patch does not say which tokens its ids are: give the base's "
                "own tokenizer."
            )
        for token_id, text in zip(self.token_ids.tolist(), self.meta.tokens, strict=True):
            found = token_text(tokenizer, token_id)
            if found != text or not text:
                raise BaseMismatchError(
                    f"{other} ({made_with[:12]}...): token {token_id} is {found!r} here, and {text!r} to the patch."
                )
        warnings.warn(
            f"{other}; the tokens of {self.meta.name} read the same in both, others do not.",
            OtherVocabularyWarning,
            stacklevel=stacklevel,
        )

    @cached_property
    def digest(self) -> str:
        """sha256 over what decides the model's output: tensors, base, side, scope and template.

        Independent of the file's layout and of what is only said about the patch: name, language,
        ticket, training, evaluation, certificate, licence, date and the base's labels.
        """
        meta = self.meta
        served: dict[str, Any] = {
            "content": "ksl_patch 1",
            "base": [meta.base.fingerprint, meta.base.vocab_size, meta.base.hidden_size, meta.base.tokenizer_digest],
            "side": meta.side,
            "scope": meta.scope,
            "template": None if meta.template is None else [meta.template.text, meta.template.chat],
        }
        if meta.template is not None and meta.template.fields:
            served["fields"] = meta.template.fields
        if meta.template is not None and meta.template.end_token_id is not None:
            served["end_token_id"] = meta.template.end_token_id
        digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode())
        for key, tensor in self._tensors().items():
            digest.update(f"\n{key} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically: a crash leaves the old file or the new one. Same patch, same bytes."""
        path = Path(path)
        content = {"format_version": FORMAT_VERSION, "checksum": self._checksum(), "meta": _as_written(self.meta)}
        meta = msgspec.json.encode(content, order="deterministic")
        # safetensors refuses tensors that share memory, and writes several metadata keys in a random order.
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in self._tensors().items()}
        content = safetensors.torch.save(tensors, metadata={"ksl_patch": meta.decode()})
        try:
            write_atomically(path, content)
        except OSError as error:
            raise PatchError(f"cannot write {path}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read and check a patch file. Raises PatchError, one sentence that names the file and the fault."""
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise PatchError(f"cannot read {path}: it is not a regular file.")
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            raise PatchError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
        try:
            return cls.from_bytes(content)
        except PatchError as error:
            raise PatchError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> Patch:
        """The same from a file's content. Raises PatchError that does not name the file."""
        file = _read_meta(content)
        try:
            tensors = safetensors.torch.load(content)
        except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError) as error:
            raise PatchError(f"not a valid safetensors file ({error}).") from error
        required = {"token_ids", "rows", "base_rows"}
        if not required <= tensors.keys() <= required | {"output_rows"}:
            raise PatchError(
                f"has the tensors {sorted(tensors)}, but a patch has {sorted(required)} (and output_rows)."
            )
        patch = cls(meta=file.meta, **tensors)
        if patch._checksum() != file.checksum:
            raise PatchError("the content does not match its checksum: the file is damaged or was edited.")
        return patch

    def row_facts(self) -> list[dict[str, Any]]:
        """Per row: token_id, token (its text), statistic (D), pvalue, base_norm, change_norm; None where unknown."""
        meta, k = self.meta, len(self.token_ids)
        base = self.base_rows.float()
        columns: dict[str, list[Any]] = {
            "token_id": self.token_ids.tolist(),
            "token": meta.tokens or [None] * k,
            "statistic": (meta.ticket and meta.ticket.statistic) or [None] * k,
            "pvalue": (meta.ticket and meta.ticket.pvalue) or [None] * k,
            "base_norm": base.norm(dim=1).tolist(),
            "change_norm": (self.rows.float() - base).norm(dim=1).tolist(),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def outside(self, table: EmbeddingTable) -> list[dict[str, Any]]:
        """Rows whose norm none of the base's own rows has: token_id, norm, and the smallest and largest norm there.

        table: the base's. Such a row is a stronger control over the model than any text is.
        """
        pieces = torch.split(torch.arange(table.vocab_size), 1 << 14)
        norms = torch.cat([table.rows(piece).float().norm(dim=1).cpu() for piece in pieces])
        low, high = float(norms.min()), float(norms.max())
        rows = self.rows if self.output_rows is None else torch.cat([self.rows, self.output_rows])
        own = rows.float().norm(dim=1).tolist()
        ids = self.token_ids.tolist() * (len(own) // len(self.token_ids))
        return [
            {"token_id": i, "norm": norm, "smallest": low, "largest": high}
            for i, norm in zip(ids, own, strict=True)
            if not low <= norm <= high
        ]

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"base_rows": self.base_rows, "rows": self.rows, "token_ids": self.token_ids}
        if self.output_rows is not None:
            tensors["output_rows"] = self.output_rows
        return dict(sorted(tensors.items()))

    def _checksum(self) -> str:
        """sha256 over the whole content, description included: finds a damaged file."""
        meta = msgspec.json.encode(_as_written(self.meta), order="deterministic")
        return hashlib.sha256(self.digest.encode() + b"\n" + meta).hexdigest()


def _as_written(meta: PatchMeta) -> dict[str, Any]:
    """The metadata as a file holds it."""
    fields: dict[str, Any] = msgspec.to_builtins(meta)
    for name, later in _LATER.items():
        if fields[name] is not None:
            fields[name] = {key: value for key, value in fields[name].items() if key not in later or value is not None}
    return fields


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text; by its name in the vocabulary where it is no whole character."""
    text: str = tokenizer.decode([token_id])
    return tokenizer.convert_ids_to_tokens(token_id) or "" if "\ufffd" in text or not text else text


def timestamp() -> str:
    """Now, or SOURCE_DATE_EPOCH when it is set (reproducible builds), as ISO 8601 in UTC."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch else datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def write_atomically(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, fsync, rename. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        with suppress(PermissionError):  # a file system without modes
            Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # what was written is there; some file systems cannot sync or open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_fields(names: Sequence[str]) -> None:
    """Names of a template's fields beside the source. Raises PatchError."""
    for name in names:
        if not _FIELD.fullmatch(name) or name == "source":
            raise PatchError(
                f"{name[:70]!r} cannot be a template's field: use up to 64 letters, digits and '_', and not 'source'."
            )
    if len(names) > _MAX_FIELDS:
        raise PatchError(f"a template has at most {_MAX_FIELDS} fields beside the sentence, not {len(names)}.")


def is_name(name: str) -> bool:
    """Whether a text can be a patch's name."""
    return bool(_NAME.fullmatch(name))


def check_name(name: str) -> str:
    """A patch's name, if it is one. Raises PatchError."""
    if not is_name(name):
        raise PatchError(
            f"{name[:100]!r} is not a patch name: use up to 96 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit."
        )
    return name


def check_language(language: str) -> str:
    """A well-formed BCP 47 language tag, such as "sw" or "zh-Hant". Raises PatchError."""
    if not _LANGUAGE.fullmatch(language):
        raise PatchError(f"{language[:100]!r} is not a BCP 47 language tag; examples are 'sw', 'pt-BR' and 'zh-Hant'.")
    return language


def _read_meta(content: bytes) -> _FileMeta:
    # safetensors: 8 bytes of header length, then that many bytes of JSON, then the data.
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise PatchError(
            f"not a valid safetensors file (its {len(content)} bytes cannot hold the header it announces)."
        )
    if length > _MAX_HEADER:
        raise PatchError(f"not a patch: its header of {length} bytes is larger than any patch's ({_MAX_HEADER}).")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise PatchError("not a valid safetensors file (its header is not JSON).") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("ksl_patch") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PatchError("a safetensors file, but not a patch: its metadata has no 'ksl_patch' entry.")
    try:
        version = msgspec.json.decode(text, type=_FormatOnly).format_version
        if version != FORMAT_VERSION:
            raise PatchError(
                f"has patch format {version}, and this ksl-patch reads format {FORMAT_VERSION}: "
                "use the ksl-patch that wrote it, or a newer one."
            )
        return msgspec.json.decode(text, type=_FileMeta)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise PatchError(f"the metadata is not valid ({error}).") from error


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """ids: int64 [k], already sorted when they come from `from_model`."""
    if not len(ids):
        raise PatchError("token_ids is empty: a patch has at least one row.")
    values = ids.cpu().numpy()
    if values.min() < 0 or values.max() >= vocab_size:
        bad = values[(values < 0) | (values >= vocab_size)]
        raise PatchError(f"token id {bad[0]} is outside the table, which has the ids 0 to {vocab_size - 1}.")
    step = np.diff(values)
    if step.min(initial=1) > 0:
        return
    if (step == 0).any():
        raise PatchError(f"token id {values[1:][step == 0][0]} occurs twice.")
    raise PatchError("token_ids must be in ascending order.")


def _check_tensors(patch: Patch) -> None:
    ids, base = patch.token_ids, patch.meta.base
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise PatchError(f"token_ids must be int64 [k], not {dtype_name(ids.dtype)} {list(ids.shape)}.")
    _check_ids(ids, base.vocab_size)
    for name in ("rows", "base_rows", "output_rows"):
        rows = getattr(patch, name)
        if rows is None:
            continue
        shape = [len(ids), base.hidden_size]
        if list(rows.shape) != shape:
            raise PatchError(f"{name} must have the shape {shape}, not {list(rows.shape)}.")
        if rows.dtype not in _ROW_DTYPES:
            raise PatchError(f"{name} must be float32, bfloat16 or float16, not {dtype_name(rows.dtype)}.")
        if dtype_name(rows.dtype) != base.dtype:
            raise PatchError(f"{name} must have the base's dtype {base.dtype}, not {dtype_name(rows.dtype)}.")
        if not all(map(math.isfinite, rows.aminmax())):  # both are NaN when any value is
            finite = rows.isfinite().all(dim=1)
            raise PatchError(f"{name} has a NaN or an infinity at token {int(ids[~finite][0])}.")


def _typed(meta: PatchMeta) -> PatchMeta:
    """The metadata as a file would give it back, so that its types are checked before it is used."""
    try:
        return msgspec.json.decode(msgspec.json.encode(meta), type=PatchMeta)
    except (msgspec.DecodeError, UnicodeEncodeError, TypeError) as error:
        raise PatchError(f"the metadata is not valid ({error}).") from error


def _check_meta(patch: Patch) -> None:
    meta, k = patch.meta, len(patch.token_ids)
    check_name(meta.name)
    if meta.language is not None:
        check_language(meta.language)
    if meta.side == "input+output" and not meta.base.tied:
        raise PatchError("side 'input+output' is for bases whose head is tied to the embedding; this base's is not.")
    if patch.output_rows is not None and meta.side != "input+output":
        raise PatchError("output_rows need side 'input+output', but the side is 'input'.")
    if meta.template is not None:
        if meta.template.text.count("{source}") != 1:
            raise PatchError("the template must contain '{source}' exactly once.")
        check_fields(meta.template.fields or ())
        end = meta.template.end_token_id
        if end is not None and not 0 <= end < meta.base.vocab_size:
            raise PatchError(f"the template's end token {end} is outside the table.")
        before = meta.template.before_answer or ""
        if before.strip() or len(before) > _MAX_FIELDS:
            raise PatchError("what stands before an answer must be a little white space.")
    if meta.tokens is not None and len(meta.tokens) != k:
        raise PatchError(f"the metadata has the text of {len(meta.tokens)} tokens for {k} token ids.")
    if meta.scope == "prompt" and meta.side != "input":
        raise PatchError("scope 'prompt' needs side 'input': the output side acts on what follows the prompt.")
    if (
        meta.origin is not None
        and sorted(i for each in meta.origin for i in each.token_ids) != patch.token_ids.tolist()
    ):
        raise PatchError("the metadata's origin does not name each token id once.")
    for name in ("statistic", "pvalue"):
        values = getattr(meta.ticket, name, None)
        if values is not None and len(values) != k:
            raise PatchError(f"the ticket has {len(values)} values of {name} for {k} token ids.")
