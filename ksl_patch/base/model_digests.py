"""sha256 digests of a model: its table, other weights, vocabulary, or all of it; a patch's is patch.py's."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch

from ksl_patch.base.table import find_embedding, innermost, peft_layers
from ksl_patch.base.tensors import FLOATS, dtype_name, row_bits, tensor_bytes

_FINGERPRINT_ROWS = 256
_BODY_VALUES = 256  # of each weight
_LABELS = ("_name_or_path", "transformers_version", "_commit_hash", "_from_model_config", "base_model_name_or_path")


def fingerprint(weight: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 over shape, dtype and up to 256 evenly spaced rows of a table [V, d]: cheap at any size.

    dtype: what the rows are rounded to before.
    """
    sample = torch.linspace(0, weight.shape[0] - 1, min(_FINGERPRINT_ROWS, weight.shape[0])).long()
    rows = weight.detach()[sample.to(weight.device)].to(dtype or weight.dtype)
    digest = hashlib.sha256(f"{list(weight.shape)} {dtype_name(rows.dtype)}\n".encode())
    digest.update(tensor_bytes(rows))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over the vocabulary, every token with its id."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


@torch.no_grad()
def body_digest(model: Any, dtype: torch.dtype) -> str | None:
    """sha256 over the weights and buffers beside the table, in their order: shapes and up to 256 values of each.

    dtype: what the values are rounded to before, so that the same weights have one digest in whatever finer dtype they
    are loaded. Names do not count, since wrappers change them, nor does a head that is a copy of the table. A merged
    adapter or a fine-tune changes much of what is sampled. None where weights are quantised, offloaded or sharded.
    """
    table = getattr(innermost(model.get_input_embeddings()), "weight", None)
    own = None if table is None else _sample(table)
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        if not isinstance(weight, torch.Tensor) or (weight.ndim > 1 and not weight.is_floating_point()):
            return None
        values = _sample(weight)
        if values is None:
            return None
        if own is not None and values.shape == own.shape and torch.equal(values, own):
            continue
        digest.update(f"{list(weight.shape)} ".encode())
        digest.update(tensor_bytes(values.to(dtype).float() if weight.is_floating_point() else values))
    return digest.hexdigest()


def _sample(weight: torch.Tensor) -> torch.Tensor | None:
    """Evenly spaced values of a weight, on the CPU; None where they are not at hand."""
    if weight.device.type == "meta" or type(weight).__name__ == "DTensor":
        return None
    at = torch.linspace(0, weight.numel() - 1, min(_BODY_VALUES, weight.numel()), dtype=torch.float64).long()
    try:
        return weight.detach().reshape(-1)[at.to(weight.device)].cpu()
    except (RuntimeError, NotImplementedError, TypeError):  # a quantised tensor of a class of its own
        return None


def weights_digest(model: Any, dtype: torch.dtype) -> tuple[str, str | None] | None:
    """A model's `fingerprint` and `body_digest`, rounded to a dtype, to compare with a patch's base of that dtype.

    None where they do not tell: weights in a coarser dtype, quantised, offloaded, or with PEFT's adapters on them; the
    body alone is None where it cannot be read, or is without the head.
    """
    adapters = peft_layers()[0] if "peft" in sys.modules else ()
    if hasattr(model, "peft_config") or any(isinstance(module, adapters) for module in model.modules()):
        return None
    table = find_embedding(model)
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised or not table.plain or any(weight.dtype not in (dtype, torch.float32) for weight in model.parameters()):
        return None
    return fingerprint(table.weight, dtype), None if table.head is None else body_digest(model, dtype)


@torch.no_grad()
def model_digest(model: Any, tokenizer: Any) -> str:
    """sha256 over what decides a model's outputs: weights, configuration, adapters, how it generates, the tokenizer.

    Weights of the table's shape count in every value, others by samples. It names what was computed, in a run folder;
    values cast to another dtype are another model.
    """
    shape = getattr(getattr(innermost(model.get_input_embeddings()), "weight", None), "shape", None)
    digest = hashlib.sha256(_tokenizer_text(tokenizer).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):
            continue
        values = _row_sums(weight) if weight.shape == shape and weight.dtype in FLOATS else _sample(weight)
        digest.update(f"{name} {list(weight.shape)} {dtype_name(weight.dtype)}\n".encode())
        if values is not None:
            digest.update(tensor_bytes(values))
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    configs = [_unlabelled(config) for config in (model.config.to_dict(), model.generation_config.to_dict(), adapters)]
    digest.update(json.dumps(configs, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for, in one that is the same in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _tokenizer_text(tokenizer: Any) -> str:
    """A tokenizer as text: how it cuts, joins and ends, beside its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(pieces, dict):
        pieces = {key: value for key, value in pieces.items() if key not in ("truncation", "padding")}
    more = [tokenizer.special_tokens_map, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return json.dumps([pieces, more, type(tokenizer).__name__], sort_keys=True, default=str)


def _row_sums(table: torch.Tensor) -> torch.Tensor:
    """For each row of a table [V, d] a weighted sum of its bits, int64 [V], which another value or order changes."""
    table = table.detach()
    row = table.shape[1] * table.itemsize
    words = table.contiguous().view(torch.int64 if row % 8 == 0 else row_bits(table[:1]).dtype)
    weights = torch.randint(1, 2**62, (words.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    weights = weights.to(table.device)
    sums = [(part.to(torch.int64) * weights).sum(dim=1) for part in torch.split(words, 4096)]
    return torch.cat(sums).cpu()


def _unlabelled(value: Any) -> Any:
    """A configuration without what names where it comes from."""
    if isinstance(value, dict):
        return {key: _unlabelled(inner) for key, inner in value.items() if key not in _LABELS}
    return value
