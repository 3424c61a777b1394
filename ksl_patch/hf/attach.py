"""`attach` itself: puts a handle on a model, and resolves what names a patch; the only store import of hf/."""

from __future__ import annotations

from typing import Any

from ksl_patch.hf.handle import PatchHandle, Reference
from ksl_patch.patch import Patch
from ksl_patch.store.references import resolve


def attach(
    model: Any,
    *,
    tokenizer: Any = None,
    capacity: int = 0,
    output_width: int = 0,
    budget: int | None = None,
    evict: bool = False,
    max_batch: int | None = None,
    strict: bool = False,
) -> PatchHandle:
    """Make a transformers model serve patches by name, another one for every row of a batch.

    tokenizer: given, patches whose ids are other tokens of it are refused too.
    capacity, output_width, budget, evict: of the bank (`PatchBank`).
    max_batch: for torch.compile and CUDA graphs. The choice is then kept in one device buffer of that many rows,
        so that nothing is compiled or captured again, and one `using` block is open at a time. Without it every
        thread has a choice of its own.
    strict: whatever runs without a choice raises; the base is chosen with None. Without it that is the base's, but
        still raises while some other thread or task has a block open, since its choice may have been meant.

    The model's own weights are not touched; PEFT's LoRA adapters on it keep working. Copies of the model and files of
    it are the base. Raises RunError when patches are attached already, BaseMismatchError when the model has no
    embedding to patch; the model is then as it was.
    """
    return PatchHandle(
        model,
        resolve=_open,
        tokenizer=tokenizer,
        max_batch=max_batch,
        strict=strict,
        bank={"capacity": capacity, "output_width": output_width, "budget": budget, "evict": evict},
    )


def _open(reference: Reference) -> tuple[Patch, str | None]:
    """The patch of what the command line takes for one, or of a path, and the store's name for it."""
    if not isinstance(reference, str):
        return Patch.load(reference), None
    found = resolve(reference)
    return found.patch, found.stored
