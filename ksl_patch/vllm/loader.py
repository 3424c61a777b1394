"""What vLLM's workers read an adapter from: a patch file, a TrainableTokens adapter, or an ordinary LoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from ksl_patch.bank import SlotRows
from ksl_patch.base import check_base
from ksl_patch.errors import BankError, KslPatchError, PatchError
from ksl_patch.interop import peft
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.store.local import Store
from ksl_patch.vllm.layer import PatchedEmbedding, correct_head, pack


class _Table:
    """This rank's part of the table, as `check_base` wants it."""

    def __init__(self, layer: PatchedEmbedding) -> None:
        self.vocab_size, self.hidden_size = layer.base_layer.org_vocab_size, layer.base_layer.embedding_dim
        self.plain, self.dtype, self.rows = layer.plain, layer.bank.tensors.rows.dtype, layer.base_rows


def load_adapter(manager: Any, stock: Callable[[Any, LoRARequest], LoRAModel], request: LoRARequest) -> LoRAModel:
    """An adapter for `manager`, a worker's LoRA manager. stock: vLLM's own loader, for what is not ours.

    Raises ValueError, one sentence, for what cannot be served exactly.
    """
    layers = {n: m for n, m in manager._adapter_manager.modules.items() if isinstance(m, PatchedEmbedding)}
    path = Path(get_adapter_absolute_path(request.lora_path))
    try:
        if path.is_file():
            patch = Patch.load(path)
            store = Store()
            if path.is_relative_to(store.root.resolve()):
                store.hold()  # an adapter that vLLM has put aside is read again
            name, layer = _only(layers)
            _check(patch, layer)
            return _adapter(manager, request, {}, name, layer, slot_rows(patch))
        if (path / peft.CONFIG).is_file() and peft.has_trainable_tokens(path):
            name, layer = _only(layers)
            config = manager._adapter_manager.model.config
            tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
            loras = {}
            if peft.read_config(path).get("peft_type") == "LORA":
                with tempfile.TemporaryDirectory() as folder:
                    peft.split_lora(path, Path(folder))
                    loras = stock(manager, msgspec.structs.replace(request, lora_path=folder)).loras
            rows = peft.read_trainable_tokens(path, embedding=name.rpartition(".")[2], tied=tied)
            return _adapter(manager, request, loras, name, layer, rows)
        lora = stock(manager, request)
        for name, layer in layers.items():
            if name in lora.loras:
                lora.loras[name] = _weights(name, _as_rows(layer, lora.loras[name]))
        return lora
    except KslPatchError as error:
        raise ValueError(f"{request.lora_name}: {error}") from error


def _only(layers: dict[str, PatchedEmbedding]) -> tuple[str, PatchedEmbedding]:
    if len(layers) != 1:
        raise BankError(
            "this engine has no embedding that takes patches: start vLLM with `--enable-lora`, and with "
            "`--lora-target-modules embed_tokens` among others where it is restricted."
            if not layers
            else f"this model has {len(layers)} input embeddings, and a patch is for one."
        )
    return next(iter(layers.items()))


def _check(patch: Patch, layer: PatchedEmbedding) -> None:
    if patch.meta.scope == "prompt":
        raise PatchError(
            "the patch acts on the prompt only, and vLLM does not say which of the tokens that it computes again "
            "after a preemption were the prompt's: serve it with `ksl_patch.attach`."
        )
    table: Any = _Table(layer)
    mine = layer.on_this_rank(patch.token_ids)
    check_base(patch.meta.base, patch.token_ids[mine], patch.base_rows[mine], table)


def _adapter(
    manager: Any,
    request: LoRARequest,
    loras: dict[str, LoRALayerWeights],
    name: str,
    layer: PatchedEmbedding,
    rows: SlotRows,
) -> LoRAModel:
    layer.bank.check(rows)
    if rows.output:
        correct_head(manager._adapter_manager.model, layer)
    return LoRAModel(request.lora_int_id, 1, {**loras, name: _weights(name, rows)})


def _weights(name: str, rows: SlotRows) -> LoRALayerWeights:
    ids, values = pack(rows)
    return LoRALayerWeights(name, 1, 1, ids, values, scaling=1)


def _as_rows(layer: PatchedEmbedding, lora: LoRALayerWeights) -> SlotRows:
    """A LoRA of the embedding, which changes the rows of those tokens alone that A has values for."""
    token_ids = lora.lora_a.ne(0).any(dim=0).nonzero()[:, 0]
    if not len(token_ids):
        token_ids = torch.zeros(1, dtype=torch.int64)
    if len(token_ids) > layer.bank.max_rows:
        raise BankError(
            f"the adapter changes {len(token_ids)} rows of the embedding, and a slot has room for "
            f"{layer.bank.max_rows}: reserve more with max_rows, or leave the embedding out of the adapter."
        )
    base = layer.base_layer(token_ids.to(layer.bank.tensors.rows.device)).cpu()
    change = lora.scaling * (lora.lora_a[:, token_ids].T.float() @ lora.lora_b.T.float())
    rows = SlotRows(token_ids, (base.float() + change).to(base.dtype))
    layer.bank.check(rows)
    return rows
