"""A base's table as its files have it, so that a patch can be checked before a model is loaded."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_NAME = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")  # what models call it


@dataclass(frozen=True)
class TableInFile:
    """Rows of a file, as `check_base` wants a table."""

    file: Path
    key: str
    vocab_size: int
    hidden_size: int
    plain: bool = True

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows [k, d] of token_ids int64 [k]."""
        with safe_open(self.file, framework="pt") as file:
            part = file.get_slice(self.key)
            return torch.cat([part[i : i + 1] for i in token_ids.tolist()])


def table_in_files(folder: Path) -> TableInFile | None:
    """The table of the base in a folder.

    None where its files do not tell: other formats than safetensors, packed weights, several tables, one that by the
    configuration is not the language model's.
    """
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
        return None  # what loads the model says what is amiss
    if kind not in ("F32", "F16", "BF16") or shape[1:] != [hidden_size]:
        return None
    return TableInFile(folder / files[keys[0]], keys[0], *shape)


def values_in_files(folder: Path, but: str | None = None) -> int | None:
    """How many values the weights in a folder have, but those of a name's end; None where its files do not tell."""
    count = 0
    try:
        for name in sorted(set(_files(folder).values())):
            with safe_open(folder / name, framework="pt") as file:
                keys = [key for key in file.keys() if not (but and key.endswith(but))]  # noqa: SIM118
                count += sum(math.prod(file.get_slice(key).get_shape()) for key in keys)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None
    return count


def _files(folder: Path) -> dict[str, str]:
    """The file of each weight, by name."""
    index = folder / _INDEX
    if index.is_file():
        found: Any = json.loads(index.read_bytes())["weight_map"]
        return {str(key): Path(file).name for key, file in found.items()}  # in the folder and nowhere else
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), _WEIGHTS)
