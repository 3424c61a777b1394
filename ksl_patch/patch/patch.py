"""The patch: token ids, rows and metadata; its digest, and its checks against a model (identity.py compares)."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ksl_patch.atomic import write_atomically
from ksl_patch.base import EmbeddingTable, check_base, find_embedding, identify
from ksl_patch.base.identity import Table, has_other_weights
from ksl_patch.base.model_digests import tokenizer_digest
from ksl_patch.base.tensors import dtype_name, tensor_bytes
from ksl_patch.errors import BaseMismatchError, OtherBodyWarning, OtherVocabularyWarning, PatchError
from ksl_patch.patch import file
from ksl_patch.patch.checks import check_ids, check_meta, check_reached, check_tensors
from ksl_patch.patch.meta import PatchMeta, Scope, Side, TemplateMeta, typed


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
        object.__setattr__(self, "meta", typed(self.meta))
        check_tensors(self.tensors, self.meta.base)
        check_meta(self.meta, self.token_ids, separate=self.output_rows is not None)

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
        check_ids(ids, table.weight.shape[0])

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
                tokens=None if tokenizer is None else [_token_text(tokenizer, index) for index in ids.tolist()],
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
        check_reached(self.token_ids, self.meta, tokenizer)
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
            found = _token_text(tokenizer, token_id)
            if found != text or not text:
                raise BaseMismatchError(
                    f"{other} ({made_with[:12]}...): token {token_id} is {found!r} here, and {text!r} to the patch."
                )
        warnings.warn(
            f"{other}; the tokens of {self.meta.name} read the same in both, others do not.",
            OtherVocabularyWarning,
            stacklevel=stacklevel,
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in the file, in alphabetical order; `output_rows` where there are any."""
        tensors = {"base_rows": self.base_rows, "rows": self.rows, "token_ids": self.token_ids}
        if self.output_rows is not None:
            tensors["output_rows"] = self.output_rows
        return dict(sorted(tensors.items()))

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
        for key, tensor in self.tensors.items():
            digest.update(f"\n{key} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically: a crash leaves the old file or the new one. Same patch, same bytes."""
        path = Path(path)
        content = file.encode(self.meta, self.tensors, self.digest)
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
        found = file.decode(content)
        patch = cls(meta=found.meta, **found.tensors)
        if file.checksum(patch.meta, patch.digest) != found.checksum:
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
        """Rows whose norm is far from any of the base's rows: token_id, norm, and the smallest and largest norm there.

        table: the base's. Far is half as large again, or as small: such a row controls a model more than any text does.
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
            if not low / 1.5 <= norm <= high * 1.5
        ]


def _token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text; by its name in the vocabulary where it is no whole character."""
    text: str = tokenizer.decode([token_id])
    return tokenizer.convert_ids_to_tokens(token_id) or "" if "\ufffd" in text or not text else text
