"""A base's table as its files have it: what can be checked of a patch before a model is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ksl_patch.base import check_base
from ksl_patch.patch import Patch

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_NAME = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")  # what models call it


@dataclass(frozen=True)
class _Table:
    """Rows of a file, as `check_base` wants a table."""

    file: Path
    key: str
    vocab_size: int
    hidden_size: int
    plain: bool = True

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as file:
            part = file.get_slice(self.key)
            return torch.cat([part[i : i + 1] for i in token_ids.tolist()])


def check_in_files(patch: Patch, folder: Path) -> None:
    """Raise BaseMismatchError where the base in a folder has other rows than the patch's.

    Nothing is said where its files do not tell: other formats than safetensors, packed weights, several tables, one
    that by the configuration is not the language model's.
    """
    table = _table(folder)
    if table is not None:
        check_base(patch.meta.base, patch.token_ids, patch.base_rows, table)  # type: ignore[arg-type]


def _table(folder: Path) -> _Table | None:
    try:
        files = _files(folder)
        keys = [key for key in files if _NAME.search(key)]
        if len(keys) != 1:
            return None
        with safe_open(folder / files[keys[0]], framework="pt") as file:
            part = file.get_slice(keys[0])
            shape, kind = part.get_shape(), part.get_dtype()
        config = json.loads((folder / "config.json").read_bytes())
        hidden_size = (config.get("text_config") or config)["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None  # the server's own loading says what is amiss
    if kind not in ("F32", "F16", "BF16") or shape[1:] != [hidden_size]:
        return None
    return _Table(folder / files[keys[0]], keys[0], *shape)


def _files(folder: Path) -> dict[str, str]:
    """The file of each weight, by name."""
    index = folder / _INDEX
    if index.is_file():
        found: Any = json.loads(index.read_bytes())["weight_map"]
        return {str(key): Path(file).name for key, file in found.items()}  # in the folder and nowhere else
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), _WEIGHTS)
