"""A base as a build holds it, and the processes that train it together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from ksl_patch.base import BaseIdentity, find_embedding, identify
from ksl_patch.base.model_digests import model_digest
from ksl_patch.errors import RunError

_SHARDED = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A base in memory, with what was read of it before its weights were cast to the dtype that they compute in.

    digest: of all that decides its outputs (`model_digest`). dtype: the table's own. scale: the standard deviation of
    the table's values.
    """

    model: Any
    tokenizer: Any
    identity: BaseIdentity
    digest: str
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Loaded:
        """Look at a model, and cast it where that is better to compute in and exact for its values.

        Raises RunError for a quantised one.
        """
        if getattr(model, "is_quantized", False):
            method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None) or "some method"
            raise RunError(
                f"the base is quantised ({getattr(method, 'value', method)}), and rows are trained on the whole one: "
                "build with that, and the patch is served on both."
            )
        table = find_embedding(model)
        identity, digest = identify(model, tokenizer), model_digest(model, tokenizer)
        dtype, scale = table.weight.dtype, float(table.weight.detach().float().std())
        # float16's range is too small for gradients, and many processors are twice as fast in float32 as in bfloat16.
        if dtype == torch.float16 or (model.device.type == "cpu" and not _cpu_computes_bfloat16()):
            model.float()
        return cls(model, tokenizer, identity, digest, dtype, scale)


def launched(device: str | None) -> PartialState:
    """The processes that a launcher (torchrun) started to train together; one without a launcher.

    device: what the user wants to train on. Raises RunError where the launcher's processes do not find each other, or
    are to hold a part of the base each.
    """
    for name, variable in _SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RunError(
                f"{name} would cut the base into parts, of which its rows could not be trained here: the base is "
                "frozen, so let each process have all of it (torchrun, or accelerate launch --multi_gpu)."
            )
    state = PartialState(cpu=not torch.accelerator.is_available() or (device or "").startswith("cpu"))
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise RunError(
            f"WORLD_SIZE says {started} processes, and {state.num_processes} train together here: start them all with "
            "torchrun, or unset it."
        )
    return state


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where torch cannot tell, it is taken not to."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value for name, value in capabilities.items() if name.endswith("bf16"))
