"""Identity of a base model: its embedding and head, its fingerprint, and whether a patch belongs to it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from ksl_patch.errors import BaseMismatchError, RunError

_FINGERPRINT_ROWS = 256
_BODY_VALUES = 256  # of each weight
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_LABELS = ("_name_or_path", "transformers_version", "_commit_hash", "_from_model_config", "base_model_name_or_path")
# Rounding float32 to bfloat16 changes a value by at most 2^-9 of itself; float16 is closer.
_ROUNDING = 2.0**-8


# Models that read the table itself, by their type and configuration: what they then compute has the base's rows.
_READ_PAST: dict[str, Callable[[Any], str | None]] = {
    "diffusion_gemma": lambda _: "multiplies with the table to condition on its own output",
    **dict.fromkeys(
        ("deberta", "deberta-v2"),
        lambda config: None if getattr(config, "legacy", True) else "takes the table as its head",
    ),
}


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What a patch remembers of its base.

    model_id and revision are labels; the other fields decide whether a model is this base.
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


@dataclass(frozen=True)
class Lookup:
    """A module that looks rows of the table up. scale: what it multiplies a row with (Gemma), None for nothing."""

    module: nn.Module
    scale: torch.Tensor | float | None


@dataclass(frozen=True)
class EmbeddingTable:
    """A model's input embedding [V, d] and its head.

    lookups: every module that reads the table, the model's input embedding first; an encoder-decoder has several.
    head: the module that maps hidden states [..., d] to logits [..., V], or None. tied: its weight is the table itself.
    Both are the innermost modules, below what PEFT wraps around them. no_head: why there is no head to correct.
    plain: the table is an ordinary floating-point tensor on the device where it is used. It may instead be
    quantised, sharded or offloaded; its rows are then read through the module.
    """

    lookups: tuple[Lookup, ...]
    head: nn.Module | None
    tied: bool
    plain: bool
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    no_head: str = "this model has no language-model head"

    @property
    def weight(self) -> torch.Tensor:
        """The table [V, d]. Raises BaseMismatchError where it is not plain."""
        if not self.plain:
            raise BaseMismatchError(
                f"the input embedding ({type(self.lookups[0].module).__name__}) is not a table of floating-point rows; "
                "load the base unquantised or dequantised, on one device."
            )
        return self.lookups[0].module.weight  # type: ignore[return-value]

    @torch.no_grad()
    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows of token_ids int64 [k] as the table has them, [k, d]."""
        token_ids = token_ids.to(self.device)
        if self.plain:
            return self.weight.detach().index_select(0, token_ids)
        lookup = self.lookups[0]
        found: torch.Tensor = lookup.module.forward(token_ids[None])[0]  # beside the hooks of a handle
        return found if lookup.scale is None else found / lookup.scale

    def check_head(self, identity: BaseIdentity, token_ids: torch.Tensor, base_rows: torch.Tensor) -> None:
        """Check that the head has the base rows [k, d] of a patch at its token ids, so that it can take others there.

        Raises BaseMismatchError: the patch would change the embedding alone.
        """
        if self.head is None:
            raise BaseMismatchError(f"the patch changes the head too, and {self.no_head}.")
        if self.tied:
            return
        weight = _stored(self.head)
        if not _is_plain(weight) or list(weight.shape) != [self.vocab_size, self.hidden_size]:
            raise BaseMismatchError(
                f"the patch changes the head too, and this model's head ({type(self.head).__name__}) is not a table of "
                "floating-point rows: load the base unquantised or dequantised."
            )
        own = weight.detach()[token_ids.to(weight.device)].cpu()
        if _differs(own, base_rows, identity.dtype)[0].any():
            raise BaseMismatchError(
                "the patch changes the head too, and was made for a base whose head is tied to the embedding; this "
                "model's head has other rows."
            )


def innermost(module: Any) -> Any:
    """The module that PEFT has wrapped, which looks up (or multiplies with) the model's own weight.

    LoRA adds to what that one gives. Raises BaseMismatchError for adapters that read the weight past it, put a
    weight of their own in its place, or are merged into it.
    """
    if "peft" not in sys.modules:
        return module
    wrappers, lora = _peft_layers()
    while isinstance(module, wrappers):
        kind = type(module).__name__
        if not isinstance(module, lora) or module.lora_variant:
            raise BaseMismatchError(
                f"PEFT's {kind} is around the embedding or the head and does not go through its rows: remove that "
                "adapter, or make a patch of it (`ksl-patch import`)."
            )
        if module.merged:
            raise BaseMismatchError(f"a LoRA is merged into the embedding or the head ({kind}): unmerge it first.")
        module = module.base_layer
    return module


@functools.cache
def _peft_layers() -> tuple[Any, Any]:
    """The classes that PEFT puts around a module, and LoRA's among them."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper), LoraLayer


def find_embedding(model: Any) -> EmbeddingTable:
    """The embedding and head of a transformers model, by its own `get_input_embeddings`.

    Raises BaseMismatchError when the model's embedding is not a lookup in a table, or does more than look a row
    up and scale it: replaced rows would not have the effect that they had in training; and while a patch is merged.
    """
    name = type(model).__name__
    try:
        module = innermost(model.get_input_embeddings())
    except (NotImplementedError, AttributeError) as error:
        raise BaseMismatchError(f"{name} does not say where its input embedding is, so it has no patches.") from error
    if not isinstance(module, nn.Module):
        raise BaseMismatchError(f"{name} has no input embedding, so it has no patches.")
    merged = getattr(vars(module).get("ksl_patch"), "merged", None)
    if merged is not None:
        raise BaseMismatchError(f"the patch {merged} is merged into the model's table: unmerge it first.")
    reason = _READ_PAST.get(getattr(model.config, "model_type", ""), lambda _: None)(model.config)
    if reason:
        raise BaseMismatchError(f"{name} {reason}, past its lookups, so its rows cannot be patched.")
    weight: Any = getattr(module, "weight", None)
    head, no_head = None, EmbeddingTable.no_head
    try:
        head = innermost(model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        pass
    except BaseMismatchError as error:
        no_head = str(error).rstrip(".")
    tied = head is not None and weight is not None and getattr(head, "weight", None) is weight
    plain = _is_plain(weight)
    if plain and weight.device.type != "meta":
        sharing = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight and m is not module]
        lookups = tuple(Lookup(m, embed_scale(m, weight.device, weight.dtype)) for m in (module, *sharing))
        for lookup in lookups:
            _check_lookup(lookup, weight, name)
        V, d = weight.shape
        return EmbeddingTable(lookups, head, tied, True, V, d, weight.dtype, weight.device, no_head)
    V, d = getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)
    if not isinstance(V, int) or not isinstance(d, int):
        raise BaseMismatchError(f"{name}'s input embedding ({type(module).__name__}) is not a table of rows.")
    if weight is not None and weight.device.type == "meta":
        tied = False  # offloaded modules share no tensor: the head's own rows tell
    hook = getattr(module, "_hf_hook", None)  # accelerate's, where the table is offloaded
    device = torch.device(getattr(hook, "execution_device", None) or model.device)
    with torch.no_grad():
        dtype = module.forward(torch.zeros(1, 1, dtype=torch.int64, device=device)).dtype
    lookup = Lookup(module, embed_scale(module, device, dtype))
    return EmbeddingTable((lookup,), head, tied, False, V, d, dtype, device, no_head)


def _is_plain(weight: Any) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()


def _stored(module: Any) -> Any:
    """A module's weight, from where accelerate keeps it when it is offloaded."""
    weight: Any = getattr(module, "weight", None)
    hook: Any = getattr(module, "_hf_hook", None)
    if weight is not None and weight.device.type == "meta" and getattr(hook, "weights_map", None) is not None:
        return hook.weights_map["weight"]
    return weight


def embed_scale(module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor | float | None:
    """What an embedding multiplies its rows by; None for nothing."""
    scale: Any = getattr(module, "embed_scale", None)
    # Gemma keeps a tensor and rounds it to the table's dtype, Bart multiplies by a float.
    return scale.to(device, dtype) if isinstance(scale, torch.Tensor) else scale


def _check_lookup(lookup: Lookup, weight: torch.Tensor, name: str) -> None:
    probe = torch.arange(min(8, weight.shape[0]), device=weight.device)[None]
    with torch.no_grad():
        found, expected = lookup.module.forward(probe), weight[probe]
    expected = expected if lookup.scale is None else expected * lookup.scale
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or not torch.equal(found, expected):
        raise BaseMismatchError(
            f"{name}'s input embedding ({type(lookup.module).__name__}) does more than look a row up and scale it, "
            "so its rows cannot be patched."
        )


def identify(model: Any, tokenizer: Any = None) -> BaseIdentity:
    """The identity of a loaded model, taken from its table and, when given, its tokenizer."""
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


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's id on the Hub: ORG/REPO."""
    return bool(_HUB_ID.fullmatch(text))


def check_base_model(base_model: str | None) -> None:
    """Raise RunError for what is not a base's id on the Hub."""
    if base_model is not None and not is_hub_id(base_model):
        raise RunError(f"{base_model[:100]!r} is not a model's id on the Hub: it has the form ORG/REPO.")


def named_in_files(folder: Path) -> str | None:
    """The id on the Hub that a model's own configuration names: where it, or what it was tuned from, came from."""
    try:
        name = json.loads((folder / "config.json").read_bytes())["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and is_hub_id(name) and not Path(name).exists() else None


def public_id(name_or_path: str) -> str | None:
    """A base's id on the Hub, or the last name of its folder: where somebody keeps it is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    for part in path.parts:
        if part.startswith("models--") and "snapshots" in path.parts:  # the Hub's cache
            return part.removeprefix("models--").replace("--", "/", 1)
    local = path.is_absolute() or name_or_path.startswith((".", "~")) or path.exists() or len(path.parts) > 2
    return path.resolve().name if local else name_or_path


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
    adapters = _peft_layers()[0] if "peft" in sys.modules else ()
    if hasattr(model, "peft_config") or any(isinstance(module, adapters) for module in model.modules()):
        return None
    table = find_embedding(model)
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised or not table.plain or any(weight.dtype not in (dtype, torch.float32) for weight in model.parameters()):
        return None
    return fingerprint(table.weight, dtype), None if table.head is None else body_digest(model, dtype)


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
        values = _row_sums(weight) if weight.shape == shape and weight.dtype in _FLOATS else _sample(weight)
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


def check_base(
    identity: BaseIdentity,
    token_ids: torch.Tensor,
    base_rows: torch.Tensor,
    table: EmbeddingTable,
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
        differs = (own - expected).norm(dim=1) > 0.2 * expected.norm(dim=1)
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


def _differs(own: torch.Tensor, expected: torch.Tensor, stored: str) -> tuple[torch.Tensor, str]:
    """Where rows [k, d] are other than those of a patch, stored with that dtype, and how closely they must agree."""
    if own.dtype == expected.dtype:
        return own != expected, "exactly"
    how = f"up to rounding ({dtype_name(own.dtype)} here, {stored} in the patch)"
    own, expected = own.double(), expected.double()
    # Relative to the row's largest value: tiny values may round to zero in float16.
    tolerance = _ROUNDING * torch.maximum(expected.abs(), 1e-3 * expected.abs().amax(dim=1, keepdim=True))
    return ((own - expected).abs() > tolerance).any(dim=1), how


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def row_bits(rows: torch.Tensor) -> torch.Tensor:
    """The values of rows as integers of the same width, so that equal means equal in every bit."""
    return rows.contiguous().view(torch.int16 if rows.itemsize == 2 else torch.int32)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in row-major order, as stored; not copied where they are so already."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
