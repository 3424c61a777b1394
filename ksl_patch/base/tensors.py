"""A tensor's dtype by name, and its values as integers and as bytes."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that a table may have


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def row_bits(rows: torch.Tensor) -> torch.Tensor:
    """The values of rows as integers of the same width, so that equal means equal in every bit."""
    return rows.contiguous().view(torch.int16 if rows.itemsize == 2 else torch.int32)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in row-major order, as stored; not copied where they are so already."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
