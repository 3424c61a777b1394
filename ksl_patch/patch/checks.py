"""Whether a patch's tensors and metadata fit together; whether they fit a model, `base/identity.py` says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ksl_patch.base import BaseIdentity
from ksl_patch.base.reserved import names_in
from ksl_patch.base.tensors import FLOATS, dtype_name
from ksl_patch.errors import BaseMismatchError, PatchError
from ksl_patch.patch.meta import PatchMeta
from ksl_patch.patch.names import check_fields, check_language, check_name

_MAX_GAP = 16  # characters


def check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """Raise PatchError unless token ids int64 [k] are ascending, unique, and in a table of so many rows."""
    if not len(ids):
        raise PatchError("token_ids is empty: a patch has at least one row.")
    values = ids.cpu().numpy()
    if values.min() < 0 or values.max() >= vocab_size:
        bad = values[(values < 0) | (values >= vocab_size)]
        raise PatchError(f"token id {bad[0]} is outside the table, which has the ids 0 to {vocab_size - 1}.")
    step = np.diff(values)
    if step.min(initial=1) > 0:
        return
    if (step == 0).any():
        raise PatchError(f"token id {values[1:][step == 0][0]} occurs twice.")
    raise PatchError("token_ids must be in ascending order.")


def check_tensors(tensors: Mapping[str, torch.Tensor], base: BaseIdentity) -> None:
    """Raise PatchError unless a patch's tensors, by name, are of one size, and rows finite and of the base's dtype."""
    ids = tensors["token_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise PatchError(f"token_ids must be int64 [k], not {dtype_name(ids.dtype)} {list(ids.shape)}.")
    check_ids(ids, base.vocab_size)
    for name in ("rows", "base_rows", "output_rows"):
        if name not in tensors:
            continue
        rows = tensors[name]
        shape = [len(ids), base.hidden_size]
        if list(rows.shape) != shape:
            raise PatchError(f"{name} must have the shape {shape}, not {list(rows.shape)}.")
        if rows.dtype not in FLOATS:
            raise PatchError(f"{name} must be float32, bfloat16 or float16, not {dtype_name(rows.dtype)}.")
        if dtype_name(rows.dtype) != base.dtype:
            raise PatchError(f"{name} must have the base's dtype {base.dtype}, not {dtype_name(rows.dtype)}.")
        if not all(map(math.isfinite, rows.aminmax())):  # both are NaN when any value is
            finite = rows.isfinite().all(dim=1)
            raise PatchError(f"{name} has a NaN or an infinity at token {int(ids[~finite][0])}.")


def check_meta(meta: PatchMeta, token_ids: torch.Tensor, *, separate: bool) -> None:
    """Raise PatchError unless the metadata is in itself right, and fits token ids int64 [k].

    separate: whether the head has rows of its own.
    """
    k = len(token_ids)
    check_name(meta.name)
    if meta.language is not None:
        check_language(meta.language)
    if meta.side == "input+output" and not meta.base.tied:
        raise PatchError("side 'input+output' is for bases whose head is tied to the embedding; this base's is not.")
    if separate and meta.side != "input+output":
        raise PatchError("output_rows need side 'input+output', but the side is 'input'.")
    if meta.template is not None:
        if any(text.count("{source}") != 1 for text in (meta.template.text, meta.template.of_base().text)):
            raise PatchError("the template must contain '{source}' exactly once.")
        check_fields(meta.template.fields or ())
        end = meta.template.end_token_id
        if end is not None and not 0 <= end < meta.base.vocab_size:
            raise PatchError(f"the template's end token {end} is outside the table.")
        before = meta.template.before_answer or ""
        if before.strip() or len(before) > _MAX_GAP:
            raise PatchError("what stands before an answer must be a little white space.")
    if meta.tokens is not None and len(meta.tokens) != k:
        raise PatchError(f"the metadata has the text of {len(meta.tokens)} tokens for {k} token ids.")
    if meta.scope == "prompt" and meta.side != "input":
        raise PatchError("scope 'prompt' needs side 'input': the output side acts on what follows the prompt.")
    if meta.origin is not None and sorted(i for each in meta.origin for i in each.token_ids) != token_ids.tolist():
        raise PatchError("the metadata's origin does not name each token id once.")
    for name in ("statistic", "pvalue"):
        values = getattr(meta.ticket, name, None)
        if values is not None and len(values) != k:
            raise PatchError(f"the ticket has {len(values)} values of {name} for {k} token ids.")


def check_reached(token_ids: torch.Tensor, meta: PatchMeta, tokenizer: Any) -> None:
    """Raise BaseMismatchError where a prompt would not reach the rows of reserved tokens, by their names.

    A tokenizer may be told to read such names as any text.
    """
    if meta.ticket is None and meta.origin is None:
        return  # another tool's, whose prompts may be made of ids
    template = meta.template.text if meta.template else ""
    for token_id in token_ids.tolist():
        name = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        if not name or not names_in([name]):
            continue
        text, where = (template, " in the patch's template") if name in template else (name, "")
        found = tokenizer(text, add_special_tokens=False).input_ids
        if found.count(token_id) != text.count(name):
            raise BaseMismatchError(
                f"this tokenizer does not read {name!r}{where} as token {token_id}, so its row would never be reached: "
                "load it without split_special_tokens, as the base has it."
            )
