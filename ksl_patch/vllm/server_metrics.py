"""Prometheus metrics of patches: what is loaded, who asked for it, how many tokens that took."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

_LATENCY = {"buckets": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)}


@functools.cache
def make_metrics() -> dict[str, Any]:
    """The metrics of this process by short names, made once."""
    by_patch = {"labelnames": ("patch",)}
    return {
        "loaded": Gauge("ksl_patch:patches_loaded", "Patches served by name.", multiprocess_mode="max"),
        "bank": Gauge("ksl_patch:bank_bytes", "Bytes of the bank on each device.", multiprocess_mode="max"),
        "requests": Counter("ksl_patch:requests", "Requests by patch.", **by_patch),
        "prompt": Counter("ksl_patch:prompt_tokens", "Prompt tokens of finished requests by patch.", **by_patch),
        "generation": Counter("ksl_patch:generation_tokens", "Generated tokens by patch.", **by_patch),
        "patched": Counter("ksl_patch:patched_positions", "Positions of prompts that a patch changes.", **by_patch),
        "unaffected": Counter(
            "ksl_patch:requests_without_effect", "Requests whose prompt has none of a patch's tokens.", **by_patch
        ),
        "load": Histogram("ksl_patch:load_seconds", "Time to load a patch into the engine.", **_LATENCY),
        "replace": Histogram("ksl_patch:replace_seconds", "Time to replace a patch in the engine.", **_LATENCY),
    }


def follow(processor: Any, metrics: dict[str, Any], came: Callable[[Any, str | None, list[int] | None], None]) -> None:
    """Count requests when they come and tokens when they end, by patch, on a server's output processor.

    came: is told of each request for a patch: vLLM's `LoRARequest`, the prompt's text and token ids as far as known.
    """
    add, finish = processor.add_request, processor._update_stats_from_finished

    @functools.wraps(add)
    def adding(request: Any, *args: Any, **kwargs: Any) -> Any:
        index = args[2] if len(args) > 2 else kwargs.get("request_index", 0)
        if request.lora_request is not None and index == 0:  # of several answers to one prompt the first
            metrics["requests"].labels(patch=request.lora_request.lora_name).inc()
            came(request.lora_request, args[0] if args else kwargs.get("prompt"), request.prompt_token_ids)
        return add(request, *args, **kwargs)

    @functools.wraps(finish)
    def finishing(req_state: Any, *args: Any, **kwargs: Any) -> Any:
        if req_state.lora_name is not None:
            metrics["prompt"].labels(patch=req_state.lora_name).inc(req_state.prompt_len)
            tokens = req_state.detokenizer.num_output_tokens() if req_state.detokenizer else 0
            metrics["generation"].labels(patch=req_state.lora_name).inc(tokens)
        return finish(req_state, *args, **kwargs)

    processor.add_request, processor._update_stats_from_finished = adding, finishing
