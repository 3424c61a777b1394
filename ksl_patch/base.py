"""Identity of a base model: its embedding and head, its fingerprint, and whether a patch belongs to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from ksl_patch.errors import BaseMismatchError

_FINGERPRINT_ROWS = 256
# Rounding float32 to bfloat16 changes a value by at most 2^-9 of itself; float16 is closer.
_ROUNDING = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What a patch remembers of its base.

    model_id and revision are labels; the other fields decide whether a model is this base.
    fingerprint: sha256 over the table's shape, dtype and evenly spaced rows (`fingerprint`).
    dtype: of the table as stored, by torch's name, such as "bfloat16".
    tokenizer_digest: sha256 of the vocabulary (`tokenizer_digest`), None when no tokenizer was given.
    """

    model_id: str | None
    revision: str | None
    fingerprint: str
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    hidden_size: Annotated[int, msgspec.Meta(ge=1)]
    dtype: str
    tied: bool
    tokenizer_digest: str | None


@dataclass(frozen=True)
class EmbeddingTable:
    """A model's input embedding and head.

    module: the input embedding; `weight` is its table [V, d].
    head: the module that maps hidden states [..., d] to logits [..., V], or None.
    tied: the head's weight is the table itself.
    scale: what the module multiplies a row with on the way out (Gemma), None for a plain lookup.
    """

    module: nn.Module
    head: nn.Module | None
    tied: bool
    scale: torch.Tensor | float | None

    @property
    def weight(self) -> torch.Tensor:
        """The table [V, d]."""
        return self.module.weight  # type: ignore[return-value]


def find_embedding(model: Any) -> EmbeddingTable:
    """The embedding and head of a transformers model, by its own `get_input_embeddings`.

    Raises BaseMismatchError when the model's embedding is not a table of floating-point rows, or does
    more than look a row up and scale it: replaced rows would not have the effect that they had in training.
    """
    name = type(model).__name__
    module = model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise BaseMismatchError(
            f"{name}'s input embedding is not a table of floating-point rows; load the base unquantised or dequantised."
        )
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is weight
    return EmbeddingTable(module=module, head=head, tied=tied, scale=_scale(module, weight, name))


def _scale(module: nn.Module, weight: torch.Tensor, name: str) -> torch.Tensor | float | None:
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor):  # Gemma rounds its scale to the table's dtype, Bart multiplies by a float
        scale = scale.to(weight.device, weight.dtype)
    probe = torch.arange(min(8, weight.shape[0]), device=weight.device)
    with torch.no_grad():
        # Not row 0: it may be a padding row of zeros, which hides a scale.
        found, expected = module(probe)[-1], weight[probe[-1]]
    expected = expected if scale is None else expected * scale
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise BaseMismatchError(
            f"{name}'s input embedding ({type(module).__name__}) does more than look a row up and scale it, "
            "so its rows cannot be patched."
        )
    return scale


def identify(model: Any, tokenizer: Any = None) -> BaseIdentity:
    """The identity of a loaded model, taken from its table and, when given, its tokenizer."""
    table = find_embedding(model)
    vocab_size, hidden_size = table.weight.shape
    return BaseIdentity(
        model_id=getattr(model.config, "_name_or_path", None) or None,
        revision=getattr(model.config, "_commit_hash", None),
        fingerprint=fingerprint(table.weight),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        dtype=dtype_name(table.weight.dtype),
        tied=table.tied,
        tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def fingerprint(weight: torch.Tensor) -> str:
    """sha256 over shape, dtype and up to 256 evenly spaced rows of a table [V, d]: cheap at any size."""
    sample = torch.linspace(0, weight.shape[0] - 1, min(_FINGERPRINT_ROWS, weight.shape[0])).long()
    rows = weight.detach()[sample.to(weight.device)]
    digest = hashlib.sha256(f"{list(weight.shape)} {dtype_name(weight.dtype)}\n".encode())
    digest.update(tensor_bytes(rows))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over the vocabulary, every token with its id."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


def check_base(
    identity: BaseIdentity,
    token_ids: torch.Tensor,
    base_rows: torch.Tensor,
    model: Any,
    tokenizer: Any = None,
) -> None:
    """Check that a model is the base that `identity` and the base rows [k, d] of a patch come from.

    The rows must be equal when the dtypes are, else equal up to rounding to the coarser dtype.
    Raises BaseMismatchError that says which check failed and with which numbers.
    """
    table = find_embedding(model)
    shape = [identity.vocab_size, identity.hidden_size]
    if list(table.weight.shape) != shape:
        raise BaseMismatchError(
            f"the patch is for a table of shape {shape}, but this model's is {list(table.weight.shape)}: another base."
        )
    own = table.weight.detach()[token_ids.to(table.weight.device)].cpu()
    if own.dtype == base_rows.dtype:
        differs = (own != base_rows).any(dim=1)
        how = "exactly"
    else:
        own, expected = own.double(), base_rows.double()
        # Relative to the row's largest value: tiny values may round to zero in float16.
        tolerance = _ROUNDING * torch.maximum(expected.abs(), 1e-3 * expected.abs().amax(dim=1, keepdim=True))
        differs = ((own - expected).abs() > tolerance).any(dim=1)
        how = f"up to rounding ({dtype_name(table.weight.dtype)} here, {identity.dtype} in the patch)"
    if differs.any():
        first = int(token_ids[differs][0])
        distance = float((own.double() - base_rows.double()).abs().max())
        raise BaseMismatchError(
            f"{int(differs.sum())} of the patch's {len(token_ids)} base rows differ from this model's, which must "
            f"agree {how}: the first is token {first}, the largest difference {distance:.3g}. The patch was made for "
            f"{identity.model_id or 'another base'}."
        )
    if tokenizer is not None and identity.tokenizer_digest is not None:
        found = tokenizer_digest(tokenizer)
        if found != identity.tokenizer_digest:
            raise BaseMismatchError(
                f"the tokenizer's vocabulary (sha256 {found[:12]}...) is not the one the patch was made with "
                f"({identity.tokenizer_digest[:12]}...): its token ids would mean other tokens."
            )


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a tensor in row-major order, as stored."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
