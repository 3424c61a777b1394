"""PEFT's TrainableTokens adapters, alone or inside a LoRA adapter, as rows of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ksl_patch.bank import SlotRows
from ksl_patch.errors import PatchError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_DELTA = ".trainable_tokens_delta"
_HEAD = "lm_head"


def has_trainable_tokens(folder: Path) -> bool:
    """Whether an adapter's folder holds trained tokens. Raises PatchError when its config cannot be read."""
    config = read_config(folder)
    return config.get("peft_type") == "TRAINABLE_TOKENS" or bool(config.get("trainable_token_indices"))


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's config. Raises PatchError."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PatchError(f"cannot read {folder / CONFIG}: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(config, dict):
        raise PatchError(f"{folder / CONFIG} is not an adapter's config: it holds no JSON object.")
    return config


def read_trainable_tokens(folder: Path, *, tied: bool) -> SlotRows:
    """The tokens that an adapter replaces and their rows, which PEFT stores as absolute values.

    tied: whether the model's head shares the embedding's table; PEFT then changes the head's rows as well.
    Raises PatchError when the adapter holds something else, or tunes different tokens in the embedding and the head.
    """
    config, tensors = read_config(folder), _read_deltas(folder)
    rows = {_HEAD if _HEAD in key.split(".") else "embedding": tensor for key, tensor in tensors.items()}
    if "embedding" not in rows or len(rows) < len(tensors):
        raise PatchError(f"{folder} has trained tokens in {sorted(tensors)}, where the input embedding's are needed.")
    alone = config.get("peft_type") == "TRAINABLE_TOKENS"
    indices = config.get("token_indices" if alone else "trainable_token_indices")
    by_module = indices if isinstance(indices, dict) else {}
    head_indices = next((by_module[name] for name in by_module if name.split(".")[-1] == _HEAD), None)
    own_indices = next((by_module[name] for name in by_module if name.split(".")[-1] != _HEAD), indices)
    if head_indices is not None and head_indices != own_indices:
        raise PatchError(f"{folder} tunes different tokens in the embedding and the head, which a patch cannot hold.")
    ids = own_indices if isinstance(own_indices, list) else []
    if not ids or not all(isinstance(index, int) and 0 <= index < 2**31 for index in ids):
        raise PatchError(f"{folder / CONFIG} names no token ids.")
    for tensor in rows.values():
        if tensor.ndim != 2 or len(tensor) != len(ids) or not tensor.is_floating_point():
            raise PatchError(f"{folder} has rows of shape {list(tensor.shape)} for {len(ids)} token ids.")
        if not tensor.isfinite().all():
            raise PatchError(f"{folder} has a NaN or an infinity in its rows.")
    own, head = rows["embedding"], rows.get(_HEAD)
    if tied and (head is None or torch.equal(own, head)):
        return SlotRows(torch.tensor(ids), own, output=True)
    return SlotRows(torch.tensor(ids), own, output=head is not None, output_rows=head)


def split_lora(folder: Path, into: Path) -> None:
    """Write the LoRA part of an adapter that also has trained tokens into a folder of its own."""
    config = read_config(folder) | {"trainable_token_indices": None}
    tensors = {key: tensor for key, tensor in _read(folder).items() if not key.endswith(_DELTA)}
    (into / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, into / WEIGHTS)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchError(f"cannot read {folder / WEIGHTS}: {error}.") from error


def _read_deltas(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.endswith(_DELTA)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchError(f"cannot read {folder / WEIGHTS}: {error}.") from error
