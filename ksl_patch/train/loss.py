"""The logits that a loss needs: those that predict an answer's tokens, and no others.

A head over 262,144 tokens costs more than twice what the layers of a small model cost; prompts and padding have no
loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ksl_patch.data.encoding import IGNORED


def answer_logits(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """What predicts the labels, float [N, V]: a row for each label after the first column that is not IGNORED.

    batch: of the forward pass, without its labels. labels: int64 [B, T]; the rows are in the order of
    `labels[:, 1:][labels[:, 1:] != IGNORED]`. The head gets the hidden states of those positions alone, as one row of
    N; what the model does to logits after its head (scales, soft caps) it does to these. A model whose head is not
    called with a hidden state for each position computes all logits.
    """
    predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # [B, T]
    called = False

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal called
        if args[0].shape[:-1] != predicts.shape:
            return args
        called = True
        return (args[0][predicts.to(args[0].device)][None], *args[1:])  # [1, N, d]

    head = getattr(model, "module", model).get_output_embeddings()  # torch's DistributedDataParallel has no such method
    hook = None if head is None else head.register_forward_pre_hook(keep)
    try:
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if called else logits[predicts.to(logits.device)]
