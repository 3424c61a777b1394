"""Which base a patch is of: what it remembers of it, and whether a model is that base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec
import torch

from ksl_patch.base.model_digests import body_digest, fingerprint, tokenizer_digest, weights_digest
from ksl_patch.base.model_id import public_id
from ksl_patch.base.table import EmbeddingTable, find_embedding, is_plain, stored_weight
from ksl_patch.base.tensors import dtype_name
from ksl_patch.errors import BaseMismatchError

# Rounding float32 to bfloat16 changes a value by at most 2^-9 of itself; float16 is closer.
_ROUNDING = 2.0**-8


class Table(Protocol):
    """A table of which rows can be read: a model's (`EmbeddingTable`), a file's, one rank's part of it.

    plain: whether they are the rows as they were trained, and not, for all that is known, quantised ones.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def plain(self) -> bool: ...  # noqa: D102
    def rows(self, token_ids: torch.Tensor, /) -> torch.Tensor:
        """The rows [k, d] of token_ids int64 [k]."""
        ...


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What a patch remembers of its base.

    model_id and revision are labels. Table and dtype decide, with the patch's base rows, whether a model is this base
    (`check_base`); another fingerprint or body is warned of (`has_other_weights`).
    fingerprint: sha256 over the table's shape, dtype and evenly spaced rows (`fingerprint`).
    dtype: of the table as stored, by torch's name, such as "bfloat16".
    tokenizer_digest: sha256 of the vocabulary (`tokenizer_digest`), None when no tokenizer was given.
    body: sha256 over samples of the other weights (`body_digest`), None where they could not be read. The same rows on
    another body are another model: its patch works there, and what was measured of it need not hold.
    """

    model_id: str | None
    revision: str | None
    fingerprint: str
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    hidden_size: Annotated[int, msgspec.Meta(ge=1)]
    dtype: str
    tied: bool
    tokenizer_digest: str | None
    body: str | None = None


def identify(model: Any, tokenizer: Any = None) -> BaseIdentity:
    """The identity of a loaded model: its table, its other weights and, when given, its tokenizer.

    Raises BaseMismatchError for a model without a table to patch.
    """
    table = find_embedding(model)
    return BaseIdentity(
        model_id=public_id(getattr(model.config, "_name_or_path", None) or ""),
        revision=getattr(model.config, "_commit_hash", None),
        fingerprint=fingerprint(table.weight),
        vocab_size=table.vocab_size,
        hidden_size=table.hidden_size,
        dtype=dtype_name(table.dtype),
        tied=table.tied,
        tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
        body=body_digest(model, table.dtype),
    )


def has_other_weights(
    identity: BaseIdentity, model: Any, digest: Callable[[torch.dtype], tuple[str, str | None] | None] | None = None
) -> bool:
    """Whether a model that has a patch's rows has other weights beside them than the patch was made with.

    Samples of the table and of all other weights are compared. False where that cannot be told. digest: the model's
    `weights_digest`, where it is kept.
    """
    dtype = getattr(torch, identity.dtype)
    found = weights_digest(model, dtype) if digest is None else digest(dtype)
    if found is None:
        return False
    table, body = found
    return table != identity.fingerprint or (None not in (body, identity.body) and body != identity.body)


def check_base(
    identity: BaseIdentity,
    token_ids: torch.Tensor,
    base_rows: torch.Tensor,
    table: Table,
) -> None:
    """Check that a model's table is that of the base which `identity` and the base rows [k, d] of a patch come from.

    The rows must be equal when the dtypes are, else equal up to rounding to the coarser dtype; those of a table
    that is not plain (quantised, say) must each be within a fifth of the row's norm.
    Raises BaseMismatchError that says which check failed and with which numbers.
    """
    shape = [identity.vocab_size, identity.hidden_size]
    found = [table.vocab_size, table.hidden_size]
    if found != shape:
        raise BaseMismatchError(
            f"the patch is for a table of shape {shape}, but this model's is {found}: another base."
        )
    own, expected = table.rows(token_ids).cpu(), base_rows
    if not table.plain:
        own, expected = own.double(), expected.double()
        # Four bits a value err by about a tenth of a row; another model's row is a whole row away.
        differs = ~((own - expected).norm(dim=1) <= 0.2 * expected.norm(dim=1))  # of NaN too
        how = "up to quantisation"
    else:
        differs, how = _differs(own, expected, identity.dtype)
    if differs.any():
        differs = differs.view(len(token_ids), -1).any(dim=1)
        first = int(token_ids[differs][0])
        distance = float((own.double() - base_rows.double()).abs().max())
        raise BaseMismatchError(
            f"{int(differs.sum())} of the patch's {len(token_ids)} base rows differ from this model's, which must "
            f"agree {how}: the first is token {first}, the largest difference {distance:.3g}. The patch was made for "
            f"{identity.model_id or 'another base'}."
        )


def check_head(identity: BaseIdentity, token_ids: torch.Tensor, base_rows: torch.Tensor, table: EmbeddingTable) -> None:
    """Check that the head has the base rows [k, d] of a patch at its token ids, so that it can take others there.

    Raises BaseMismatchError: the patch would change the embedding alone.
    """
    if table.head is None:
        raise BaseMismatchError(f"the patch changes the head too, and {table.no_head}.")
    if table.tied:
        return
    weight = stored_weight(table.head)
    if not is_plain(weight) or list(weight.shape) != [table.vocab_size, table.hidden_size]:
        raise BaseMismatchError(
            f"the patch changes the head too, and this model's head ({type(table.head).__name__}) is not a table of "
            "floating-point rows: load the base unquantised or dequantised."
        )
    own = weight.detach()[token_ids.to(weight.device)].cpu()
    if _differs(own, base_rows, identity.dtype)[0].any():
        raise BaseMismatchError(
            "the patch changes the head too, and was made for a base whose head is tied to the embedding; this "
            "model's head has other rows."
        )


def _differs(own: torch.Tensor, expected: torch.Tensor, stored: str) -> tuple[torch.Tensor, str]:
    """Where rows [k, d] are other than those of a patch, stored with that dtype, and how closely they must agree."""
    if own.dtype == expected.dtype:
        return own != expected, "exactly"
    how = f"up to rounding ({dtype_name(own.dtype)} here, {stored} in the patch)"
    own, expected = own.double(), expected.double()
    # Relative to the row's largest value: tiny values may round to zero in float16.
    tolerance = _ROUNDING * torch.maximum(expected.abs(), 1e-3 * expected.abs().amax(dim=1, keepdim=True))
    return (~((own - expected).abs() <= tolerance)).any(dim=1), how  # of NaN too
