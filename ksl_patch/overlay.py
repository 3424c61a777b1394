"""The overlay: replaces rows of an embedding's output by slot, and corrects the logits of patched tokens.

The trainer and the runtimes share it. It is tensor code without a Python branch on data: it runs under torch.compile
and CUDA graphs, and its cost does not depend on how many patches are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ksl_patch.bank import BankTensors, PatchBank, SlotRows
from ksl_patch.bank.lookup import LOW
from ksl_patch.base import EmbeddingTable, find_embedding
from ksl_patch.patch import Patch


def slot_rows(patch: Patch) -> SlotRows:
    """A patch in the overlay's terms."""
    meta = patch.meta
    return SlotRows(patch.token_ids, patch.rows, meta.side == "input+output", patch.output_rows, meta.scope == "prompt")


def replace_rows(
    embeddings: torch.Tensor, position: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | float | None
) -> torch.Tensor:
    """embeddings [..., d] with `rows[position]` (times the embedding's scale) wherever position int64 [...] >= 0.

    Embeddings on another device than the rows get them from there.
    """
    replacement = F.embedding(position.clamp(min=0), rows)
    if scale is not None:
        replacement = replacement * scale
    if embeddings.device != rows.device:
        replacement, position = replacement.to(embeddings.device), position.to(embeddings.device)
    return torch.where((position >= 0)[..., None], replacement.to(embeddings.dtype), embeddings)


def correct_logits(
    bank: BankTensors,
    slots: torch.Tensor,
    width: int,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> torch.Tensor:
    """hidden [B, T, d], logits [B, T, V] -> logits with those of the patched tokens from the slots' rows of the head.

    width: the most rows of the head that one of the slots changes; the cost is that of so many for every position.
    bias: [V], the head's. finish: what the model does to logits after the head. A head on another device than the
    bank gets the rows from there.
    """
    entries, known = bank.head_entries(slots, width)  # [B, T or 1, K], [B, T or 1, 1]
    token_ids = (entries >> 32).to(hidden.device)
    rows = bank.rows[entries & LOW].to(hidden.device, hidden.dtype)  # [B, T or 1, K, d]
    known = known.to(hidden.device)
    each_row = rows.shape[1] == 1
    patched = hidden @ rows[:, 0].mT if each_row else (rows @ hidden[..., None]).squeeze(-1)  # [B, T, K]
    if bias is not None:
        patched = patched + bias[token_ids]
    patched = finish(patched)
    # A line is filled up with its first entry; all its copies are to have one value.
    patched = torch.where(token_ids == token_ids[..., :1], patched[..., :1], patched).to(logits.dtype)
    token_ids, known = token_ids.expand_as(patched), known.expand_as(patched)
    return logits.scatter(-1, token_ids, torch.where(known, patched, logits.gather(-1, token_ids)))


class Overlay:
    """A bank's patches over one model's embedding and head.

    slots: int64, the slot of each position: [B, T], or [B, 1] for one in each batch row, or [1, 1].
    """

    def __init__(self, table: EmbeddingTable, bank: PatchBank) -> None:
        self.bank = bank
        self._head_bias = getattr(table.head, "bias", None)

    def embed(
        self,
        slots: torch.Tensor,
        token_ids: torch.Tensor,
        embeddings: torch.Tensor,
        scale: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """token_ids [B, T], embeddings [B, T, d] -> [B, T, d] with the patched rows, times the scale."""
        bank = self.bank.tensors
        return replace_rows(embeddings, bank.lookup(slots, token_ids), bank.rows, scale)

    def correct(self, slots: torch.Tensor, width: int, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, d], logits [B, T, V] -> logits with those of the patched tokens from the patch's rows.

        width: as in `correct_logits`.
        """
        return correct_logits(self.bank.tensors, slots, width, hidden, logits, self._head_bias)


class TrainedRows(nn.Module):
    """The rows of one patch while they are trained, in float32 [k, d].

    prompt: bool [B, T], the prompts' positions in the forward pass that comes; rows of scope "prompt" act there alone.
    """

    prompt: torch.Tensor
    rows: nn.Parameter
    index: torch.Tensor
    token_ids: torch.Tensor

    def __init__(self, table: EmbeddingTable, patch: SlotRows) -> None:
        super().__init__()
        V, device = table.weight.shape[0], table.weight.device
        index = torch.full((V,), -1, dtype=torch.int64, device=device)
        index[patch.token_ids.to(device)] = torch.arange(len(patch.token_ids), device=device)
        self.rows = nn.Parameter(patch.rows.to(device, torch.float32, copy=True))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("token_ids", patch.token_ids.to(device), persistent=False)
        self._head_bias, self._prompt_only = getattr(table.head, "bias", None), patch.prompt_only

    @contextmanager
    def marking(self, mask: torch.Tensor) -> Iterator[None]:
        """A `with` block whose forward passes have the prompt where mask bool [B, T] says."""
        self.prompt = mask
        yield

    def embed(
        self, token_ids: torch.Tensor, embeddings: torch.Tensor, scale: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """token_ids [B, T], embeddings [B, T, d] -> [B, T, d] with the trained rows, times the scale."""
        position = self.index[token_ids]
        if self._prompt_only:
            position = position.where(self.prompt, -1)
        return replace_rows(embeddings, position, self.rows, scale)

    def correct(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, d], logits [B, T, V] -> logits with those of the patched tokens from the trained rows."""
        bias = None if self._head_bias is None else self._head_bias[self.token_ids]
        return logits.index_copy(-1, self.token_ids, F.linear(hidden, self.rows.to(hidden.dtype), bias))


@contextmanager
def training(model: Any, patch: SlotRows) -> Iterator[TrainedRows]:
    """The model with trainable rows over its embedding (and head) for the length of a `with` block.

    They are a submodule of the model, so that optimisers, devices and checkpoints see them.
    """
    table = find_embedding(model)
    trained = TrainedRows(table, patch)
    model.add_module("ksl_overlay", trained)
    hooks = [
        lookup.module.register_forward_hook(
            lambda _, args, output, scale=lookup.scale: trained.embed(args[0], output, scale)
        )
        for lookup in table.lookups
    ]
    if patch.output:
        assert table.head is not None
        hooks.append(table.head.register_forward_hook(lambda _, args, output: trained.correct(args[0], output)))
    try:
        yield trained
    finally:
        for hook in hooks:
            hook.remove()
        del model.ksl_overlay
