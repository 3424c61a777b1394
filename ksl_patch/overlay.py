"""The overlay: replaces rows of an embedding's output according to each batch row's slot.

The trainer and the runtimes share it. Slot 0 is the base. There is no Python branch on data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ksl_patch.base import EmbeddingTable, find_embedding


@dataclass(frozen=True)
class SlotRows:
    """What one slot replaces: token_ids int64 [k], rows [k, d], and whether the head's rows change too.

    output_rows: [k, d] for the head; None with `output` means the same rows.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    output: bool = False
    output_rows: torch.Tensor | None = None


class Overlay(nn.Module):
    """Holds the rows of slots 1..S and applies them to an embedding's output and to the logits.

    rows: parameter [N, d], all slots' rows one after the other.
    index: int64 [S + 1, V], (slot, token id) -> position in `rows`, -1 for the base's own row.
    slots: int64 [B], the slot of each batch row, or [1] for one slot in the whole batch.
    trainable: keep the rows in float32 and let gradients reach them; else they have the table's dtype.
    """

    rows: nn.Parameter
    index: torch.Tensor
    slots: torch.Tensor

    def __init__(self, table: EmbeddingTable, patches: Sequence[SlotRows], *, trainable: bool = False) -> None:
        super().__init__()
        weight = table.weight
        dtype = torch.float32 if trainable else weight.dtype
        V, device = weight.shape[0], weight.device
        index = torch.full((len(patches) + 1, V), -1, dtype=torch.int64)
        self._outputs: list[tuple[int, slice]] = []
        start = 0
        for slot, patch in enumerate(patches, start=1):
            stop = start + len(patch.token_ids)
            index[slot, patch.token_ids] = torch.arange(start, stop)
            if patch.output:
                self._outputs.append((slot, slice(start, stop)))
            start = stop
        self.rows = nn.Parameter(
            torch.cat([patch.rows.to(device, dtype) for patch in patches]), requires_grad=trainable
        )
        separate = [patch.rows if patch.output_rows is None else patch.output_rows for patch in patches]
        tied = all(patch.output_rows is None for patch in patches)
        output_rows = None if tied else torch.cat([rows.to(device, dtype) for rows in separate])
        self.register_buffer("_output_rows", output_rows, persistent=False)
        self.register_buffer("_token_ids", torch.cat([p.token_ids for p in patches]).to(device), persistent=False)
        self.register_buffer("index", index.to(device), persistent=False)
        self.register_buffer("slots", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        self._scale = table.scale

    def use(self, slots: Sequence[int] | torch.Tensor) -> None:
        """Set the slot of each batch row; a single entry holds for a batch of any size."""
        self.slots = torch.as_tensor(slots, dtype=torch.int64, device=self.index.device)

    def forward(self, token_ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [B, T], embeddings [B, T, d] -> [B, T, d] with the patched rows in place."""
        position = self.index[self.slots[:, None], token_ids]  # [B, T]
        replacement = F.embedding(position.clamp(min=0), self.rows)
        if self._scale is not None:
            replacement = replacement * self._scale
        return torch.where((position >= 0)[..., None], replacement.to(embeddings.dtype), embeddings)

    def correct(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, d], logits [B, T, V] -> logits with those of the patched tokens from the patch's rows."""
        rows: torch.Tensor = self.rows if self._output_rows is None else self._output_rows  # type: ignore[assignment]
        for slot, part in self._outputs:
            ids = self._token_ids[part]  # type: ignore[index]
            patched = F.linear(hidden, rows[part].to(hidden.dtype)).to(logits.dtype)  # [B, T, k]
            chosen = torch.where((self.slots == slot)[:, None, None], patched, logits[..., ids])
            logits = logits.index_copy(-1, ids, chosen)
        return logits

    @property
    def corrects_logits(self) -> bool:
        """Whether any slot has side input+output."""
        return bool(self._outputs)


@contextmanager
def overlaid(model: Any, patches: Sequence[SlotRows], *, trainable: bool = False) -> Iterator[Overlay]:
    """The model with an overlay over its embedding (and head) for the length of a `with` block.

    The overlay is a submodule of the model, so that optimisers, devices and checkpoints see its rows.
    """
    table = find_embedding(model)
    overlay = Overlay(table, patches, trainable=trainable)
    model.add_module("ksl_overlay", overlay)
    hooks = [table.module.register_forward_hook(lambda _, args, output: overlay(args[0], output))]
    if overlay.corrects_logits:
        assert table.head is not None
        hooks.append(table.head.register_forward_hook(lambda _, args, output: overlay.correct(args[0], output)))
    try:
        yield overlay
    finally:
        for hook in hooks:
            hook.remove()
        del model.ksl_overlay
