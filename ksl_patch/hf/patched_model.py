"""The model that patches are attached to: whether it is as it was found, and a patch merged into its own table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ksl_patch.base import find_embedding
from ksl_patch.base.table import innermost
from ksl_patch.base.tensors import dtype_name
from ksl_patch.errors import RunError


@dataclass(frozen=True)
class _Merged:
    """What a merge has overwritten: the rows of the table at token_ids, and the tied head's weight if it was untied.

    merged_rows, head_weight: what there is in their place.
    """

    name: str
    token_ids: torch.Tensor
    rows: torch.Tensor
    merged_rows: torch.Tensor
    tied: Any
    head_weight: Any
    tie_word_embeddings: Any


class PatchedModel:
    """A transformers model and its table. is_attached: whether hooks are on it. merged: what a merge has changed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.table = find_embedding(model)
        self.is_attached = False
        self.merged: _Merged | None = None
        self._weight = self.table.weight if self.table.plain else None
        self._state = table_state(self._weight)

    def check_attached(self) -> None:
        """Raise RunError once the handle is detached."""
        if not self.is_attached:
            raise RunError("the handle is detached from its model: attach again.")

    def check_unchanged(self) -> None:
        """Raise RunError unless the model still looks its tokens up where `attach` found it, in the same table."""
        table = self.table
        module = innermost(self.model.get_input_embeddings())
        weight = self._weight
        if module is not table.lookups[0].module or (
            weight is not None and (module.weight is not weight or len(weight) != table.vocab_size)
        ):
            raise RunError("the model's input embedding was replaced after `attach`: detach, and attach again.")
        if weight is not None and self.merged is None and table_state(weight) != self._state:
            if (weight.dtype, weight.device) == (table.dtype, table.device):
                raise RunError("the model's table was changed after `attach`: detach, attach again, and load again.")
            raise RunError(
                f"the model was moved to {dtype_name(weight.dtype)} on {weight.device} after `attach`, "
                f"which found {dtype_name(table.dtype)} on {table.device}: detach, and attach again."
            )
        if self.merged is None and table.head is not None:
            head = innermost(self.model.get_output_embeddings())
            if head is not table.head or (table.tied and head.weight is not module.weight):
                raise RunError("the model's head was replaced after `attach`: detach, and attach again.")

    def merge(self, name: str, token_ids: torch.Tensor, rows: torch.Tensor, output_rows: torch.Tensor | None) -> None:
        """Write rows [k, d] into the table at token_ids int64 [k], and output_rows into the head's.

        output_rows: None leaves the head alone, which then gets a table of its own; `rows` itself changes a tied one
        with the table. Raises RunError where the model cannot have that.
        """
        weight, head = self.table.weight, self.table.head
        if output_rows is not None and not self.table.tied:
            raise RunError(f"{name} changes the head too, and this model's is not tied: serve it with `using`.")
        tied, tie = None, getattr(self.model.config, "tie_word_embeddings", None)
        if self.table.tied and output_rows is not rows:
            assert head is not None
            if self.model.config.is_encoder_decoder:
                raise RunError(f"{name} leaves the head alone, which this encoder-decoder shares: use `using`.")
            tied, head.weight = head.weight, nn.Parameter(weight.detach().clone(), requires_grad=False)
            self.model.config.tie_word_embeddings = False  # what is saved meanwhile has two tables
            if output_rows is not None:
                head.weight.data[token_ids] = output_rows
        self.merged = _Merged(
            name, token_ids, weight.detach()[token_ids].clone(), rows, tied, head and head.weight, tie
        )
        weight.data[token_ids] = rows

    def unmerge(self) -> None:
        """Give the table its own rows back. Raises RunError where it was changed while the patch was merged."""
        assert self.merged is not None
        merged, head = self.merged, self.table.head
        weight: torch.Tensor = innermost(self.model.get_input_embeddings()).weight
        if (
            weight is not self._weight
            or (merged.tied is not None and (head is None or head.weight is not merged.head_weight))
            or not any(torch.equal(weight.detach()[merged.token_ids], r) for r in (merged.merged_rows, merged.rows))
        ):
            raise RunError(
                f"the model's table was changed while {merged.name} was merged, so the patch cannot be taken out: "
                "undo that change (unmerge what was merged after it), or load the base anew."
            )
        self.table.weight.data[merged.token_ids] = merged.rows
        if merged.tied is not None:
            assert head is not None
            head.weight = merged.tied
            self.model.config.tie_word_embeddings = merged.tie_word_embeddings
        self.merged = None


def table_state(weight: torch.Tensor | None) -> tuple[Any, ...]:
    """What tells that a table is still as it was: where it is, and how often it was written to."""
    if weight is None:
        return ()
    return weight.dtype, weight.device, weight.data_ptr(), None if weight.is_inference() else weight._version
