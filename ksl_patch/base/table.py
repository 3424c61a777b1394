"""Finds a model's embedding table and head, or refuses an architecture whose rows cannot be replaced."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ksl_patch.errors import BaseMismatchError

# Models that read the table itself, by their type and configuration: what they then compute has the base's rows.
_READ_PAST: dict[str, Callable[[Any], str | None]] = {
    "diffusion_gemma": lambda _: "multiplies with the table to condition on its own output",
    **dict.fromkeys(
        ("deberta", "deberta-v2"),
        lambda config: None if getattr(config, "legacy", True) else "takes the table as its head",
    ),
}


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


def innermost(module: Any) -> Any:
    """The module that PEFT has wrapped, which looks up (or multiplies with) the model's own weight.

    LoRA adds to what that one gives. Raises BaseMismatchError for adapters that read the weight past it, put a
    weight of their own in its place, or are merged into it.
    """
    if "peft" not in sys.modules:
        return module
    wrappers, lora = peft_layers()
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
def peft_layers() -> tuple[Any, Any]:
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
    plain = is_plain(weight)
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


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point table, and not quantised or sharded."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()


def stored_weight(module: Any) -> Any:
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
