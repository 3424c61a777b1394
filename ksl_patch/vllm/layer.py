"""vLLM's embedding layer with patches: which slot each position has, and the rows that are looked up there."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.utils.torch_utils import async_tensor_h2d

from ksl_patch.bank import SlotBank, SlotRows
from ksl_patch.base.table import embed_scale
from ksl_patch.overlay import correct_logits, replace_rows
from ksl_patch.vllm.settings import read_settings

_OUTPUT, _SEPARATE = 1, 2
_PIECE = 32 << 20  # bytes of the head's rows that are gathered at a time


def pack(patch: SlotRows) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch as the two tensors of an adapter that vLLM keeps, pins and hands to `set_lora`.

    First int64 [1 + k], flags and token ids; then rows [k, d], or [2k, d] with the head's own rows behind them.
    """
    flags = (_OUTPUT if patch.output else 0) | (_SEPARATE if patch.output_rows is not None else 0)
    rows = patch.rows if patch.output_rows is None else torch.cat([patch.rows, patch.output_rows])
    return torch.cat([torch.tensor([flags]), patch.token_ids]), rows


def unpack(ids: torch.Tensor, rows: torch.Tensor) -> SlotRows:
    """`pack` backwards."""
    flags, token_ids = int(ids[0]), ids[1:]
    k = len(token_ids)
    return SlotRows(token_ids, rows[:k], bool(flags & _OUTPUT), rows[k:] if flags & _SEPARATE else None)


class PatchedEmbedding(VocabParallelEmbeddingWithLoRA):  # type: ignore[misc]
    """A `VocabParallelEmbedding` whose rows are replaced, position by position, by those of the request's patch.

    It runs behind the all-reduce of tensor parallelism: every rank holds all rows of all patches.

    reason: why no patch can be served, head_reason: why none of side "input+output"; None where they can.
    """

    bank: SlotBank
    reason: str | None = None
    head_reason: str | None = None
    measured = False

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: Any = None) -> None:
        """Reserve `max_rows` rows for each of `max_loras` slots."""
        self.vllm_config = get_current_vllm_config()
        settings = read_settings(self.vllm_config.additional_config)
        base = self.base_layer
        weight: Any = getattr(base, "weight", None)
        plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        self.plain = plain and type(base.quant_method).__name__ == "UnquantizedEmbeddingMethod"
        dtype = weight.dtype if self.plain else lora_config.lora_dtype
        self.slots = max_loras
        self.bank = SlotBank(
            max_loras,
            settings.max_rows or lora_config.max_lora_rank,
            base.org_vocab_size,
            base.embedding_dim,
            dtype=dtype,
            device=next(base.parameters()).device,
        )
        # As buffers they come back from sleep, which leaves other tensors of the model's memory undefined.
        for name, tensor in vars(self.bank.tensors).items():
            self.register_buffer(f"bank_{name}", tensor, persistent=False)
        self.lora_a_stacked = self.bank.tensors.rows[:1, :0]  # vLLM asks it for the dtype of its warm-up adapters
        model = self.vllm_config.model_config
        if model.enable_prompt_embeds and not (self.vllm_config.use_v2_model_runner or model.is_multimodal_model):
            self.reason = (
                "with --enable-prompt-embeds this runner of vLLM looks up some of a batch's tokens without saying "
                "which: leave it out."
            )
        elif self.vllm_config.parallel_config.use_ubatching:
            self.reason = (
                "with two micro-batches at a time (--enable-dbo, --ubatch-size) vLLM says who has which patch for the "
                "first of them alone: leave it out."
            )

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.bank.clear(index + 1)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot with what `pack` gave. vLLM's warm-up adapters, floating-point zeros, leave it empty."""
        if lora_a.is_floating_point():
            if lora_b.any():
                raise ValueError("a LoRA of the embedding came past the manager that makes rows of it.")
            self.bank.clear(index + 1)
        else:
            self.bank.write(index + 1, unpack(lora_a, lora_b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids int64 or int32 [T], or [1, T] as transformers' models have it -> embeddings [T, d] or [1, T, d]."""
        bank = self.bank.tensors
        indices = self.punica_wrapper._token_lora_indices[: x.numel()].view_as(x)
        position = bank.lookup(self.slot_of(indices), x)
        return replace_rows(self.base_layer(x), position, bank.rows, self.scale)

    @property
    def scale(self) -> torch.Tensor | float | None:
        """What the base's own class multiplies a row by, where it is transformers' implementation of a model."""
        rows = self.bank.tensors.rows
        return embed_scale(self.base_layer, rows.device, rows.dtype)

    def unscaled(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The base's rows [k, d] of token_ids int64 [k], from whichever rank has them."""
        rows: torch.Tensor = VocabParallelEmbedding.forward(self.base_layer, token_ids)
        return rows

    @torch.no_grad()
    def looks_up(self) -> bool:
        """Whether the base's layer looks a row up, scales it, and does nothing more."""
        ids = torch.arange(min(8, self.base_layer.org_vocab_size), device=self.bank.tensors.rows.device)
        expected, scale = self.unscaled(ids), self.scale
        return torch.equal(self.base_layer(ids), expected if scale is None else expected * scale)

    def slot_of(self, indices: torch.Tensor) -> torch.Tensor:
        """vLLM's index of an adapter, -1 for none, as a slot. Padding holds anything and may not point outside."""
        return indices.clamp(-1, self.slots - 1) + 1

    def on_this_rank(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Which of token_ids int64 [k] are in this rank's part of the table, bool [k]."""
        shard = self.base_layer.shard_indices
        start, end = int(shard.org_vocab_start_index), int(shard.org_vocab_end_index)
        return (token_ids >= start) & (token_ids < end)

    def base_rows(self, token_ids: torch.Tensor) -> Any:
        """The base's rows [k, d] of token_ids int64 [k] that are on this rank."""
        local = (token_ids - self.base_layer.shard_indices.org_vocab_start_index).to(self.bank.tensors.rows.device)
        return self.base_layer.quant_method.embedding(self.base_layer, local)


def input_embeddings(model: Any) -> list[str]:
    """The names of the model's input embeddings of its whole vocabulary, on this rank."""
    config = model.config.get_text_config()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    # Some models have smaller tables beside it, of positions, of token types, or for each layer.
    return [name for name, table in found.items() if table.embedding_dim == config.hidden_size] or list(found)


def follow_head(model: nn.Module, layer: PatchedEmbedding, *, last: bool) -> None:
    """Correct a model's logits for patches of side "input+output" from now on.

    last: whether this rank of a pipeline computes logits. An engine whose logits cannot be followed gets a
    `head_reason` and nothing else.
    """
    if not last:
        return
    config = layer.vllm_config
    found = [m for m in model.modules() if isinstance(m, (LogitsProcessor, LogitsProcessorWithLoRA))]
    inner = {id(m.base_layer) for m in found if isinstance(m, LogitsProcessorWithLoRA)}
    processors = [m for m in found if id(m) not in inner]
    if len(processors) != 1:
        layer.head_reason = f"{type(model).__name__} has {len(processors)} logits processors, where one is needed."
    elif config.parallel_config.enable_batch_sharded_sampling:
        layer.head_reason = "patches of side 'input+output' do not go with batch-sharded sampling."
    elif config.speculative_config is not None and config.use_v2_model_runner:
        # It says which patch a request has, not which each of a request's several drafted positions has.
        layer.head_reason = "patches of side 'input+output' do not go with speculative decoding on this runner."
    else:
        processors[0].register_forward_hook(functools.partial(_correct, layer))


def _correct(layer: PatchedEmbedding, processor: Any, args: Any, logits: torch.Tensor | None) -> torch.Tensor | None:
    """logits [N, V] of a LogitsProcessor called with (head, hidden [N, d], bias), corrected in place."""
    bank = layer.bank
    if logits is None or not (bank.changes_head or not layer.measured):
        return logits
    hidden, bias = args[1], args[2] if len(args) > 2 else None
    if bank.changes_head:
        slots = layer.slot_of(_indices(layer.punica_wrapper, hidden))
    else:  # once, while vLLM measures the memory that a step takes
        slots = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    layer.measured = True
    head_dtype = getattr(processor, "head_dtype", None) or hidden.dtype

    def finish(values: torch.Tensor) -> torch.Tensor:
        if processor.soft_cap is not None:
            values = torch.tanh(values / processor.soft_cap) * processor.soft_cap
        return values if processor.scale == 1.0 else values * processor.scale

    size = max(1, _PIECE // (bank.max_rows * bank.hidden_size * torch.finfo(head_dtype).bits // 8))
    for piece in range(0, len(hidden), size):
        here = slice(piece, piece + size)
        # A batch of one position each: [n, 1, d] and slots [n, 1].
        wide, values = hidden[here].to(head_dtype)[:, None], logits[here, None]
        logits[here] = correct_logits(bank.tensors, slots[here, None], bank.max_rows, wide, values, bias, finish)[:, 0]
    return logits


def _indices(punica: Any, hidden: torch.Tensor) -> Any:
    """vLLM's adapter index of each row of hidden [N, d].

    What is sampled from is a copy of the rows at the requests' last positions. Log-probabilities of a prompt are
    computed from a view into all positions, of which the offset says where it begins.
    """
    count, d = hidden.shape
    positions, sampled = punica.indices_len[:2]
    if hidden.untyped_storage().nbytes() == hidden.nbytes:
        if count == sampled:  # of as many positions they are all
            return punica._sampler_indices[:count]
        if count != positions:
            raise RuntimeError(
                f"ksl_patch: {count} rows of logits are neither the {sampled} sampled nor all {positions}."
            )
    elif hidden.stride() != (d, 1):
        raise RuntimeError(f"ksl_patch: the rows of logits are not those of positions, in strides {hidden.stride()}.")
    start = hidden.storage_offset() // d
    return punica._token_lora_indices[start : start + count]


def update_indices(punica: Any) -> None:
    """Have vLLM's record of which position has which adapter made without a loop over tokens, on one punica wrapper.

    Only where no other layer takes adapters: what their kernels want beside it is left out.
    """

    def update(mapping: Any, lora_index_to_id: list[int | None], *_: Any, **__: Any) -> None:
        index = {number: place for place, number in enumerate(lora_index_to_id) if number is not None}
        both = (
            (punica._token_lora_indices, mapping.index_mapping),
            (punica._sampler_indices, mapping.prompt_mapping),
        )
        for which, (to, numbers) in enumerate(both):
            known, where = np.unique(np.asarray(numbers, dtype=np.int64), return_inverse=True)
            found = np.array([index[n] if n > 0 else -1 for n in known.tolist()], dtype=np.int64)[where]
            to[: len(found)].copy_(async_tensor_h2d(found, device=to.device), non_blocking=True)
            punica.indices_len[which] = len(found)

    punica.update_metadata = update
