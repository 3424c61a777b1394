"""The runtime for transformers: patches on a model by name, loading a base, and generating; vllm/ is the other."""

from ksl_patch.hf.attach import attach
from ksl_patch.hf.generation import Completion, complete, end_token_id, end_token_ids, generate, prompt_ids
from ksl_patch.hf.handle import PatchHandle
from ksl_patch.hf.loading import load_base

__all__ = [
    "Completion", "PatchHandle", "attach", "complete", "end_token_id", "end_token_ids", "generate", "load_base",
    "prompt_ids",
]  # fmt: skip
