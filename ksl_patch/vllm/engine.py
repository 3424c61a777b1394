"""Before a request enters vLLM's engine: every worker reads and checks its patch, or that request alone fails.

vLLM reads an adapter inside the step that needs it first, where an error ends the engine.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.request import RequestStatus

from ksl_patch.interop import peft
from ksl_patch.vllm.manager import two_contents
from ksl_patch.vllm.settings import read_settings

logger = logging.getLogger("vllm.ksl_patch")
_MARK = "ksl_patch: "  # of a stop reason that is one of our sentences
_CHANGING, _CHANGED = ("start_weight_update", "update_weights"), ("finish_weight_update", "reload_weights")


class Admission:
    """What the workers of one engine have read and keep, by adapter id.

    They keep up to `kept_bytes` of the settings, beyond which what has waited longest goes, save what a request in
    flight needs.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._limit = read_settings(core.vllm_config.additional_config).kept_bytes
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._checked: dict[int, str] = {}
        self._changing = False

    def admit(self, request: LoRARequest, *, anew: bool = False) -> None:
        """Have the workers read and load what a request names, if they have not. Raises ValueError, one sentence.

        anew: whether or not they have.
        """
        number, path = request.lora_int_id, request.lora_path
        if self._checked.get(number) == path and not anew:
            if number in self._kept:
                self._kept.move_to_end(number)
            return
        in_flight = {
            other.lora_request.lora_int_id: other.lora_request.lora_path
            for other in self._core.scheduler.requests.values()
            if other.lora_request is not None
        }
        if in_flight.get(number, path) != path and not request.load_inplace:
            raise ValueError(two_contents(request, in_flight[number]))
        if self._core.model_executor.is_sleeping or self._changing:
            if _ordinary(path) and not anew:
                return  # it waits, and is loaded in the step that it is for
            state = "sleeps" if not self._changing else "is getting other weights"
            raise ValueError(f"{request.lora_name}: the engine {state}, and its base cannot be read: try again later.")
        replies = self._core.model_executor.collective_rpc("ksl_patch_add", args=(request, self._over(in_flight)))
        for _, problem in replies:
            if problem is not None:
                raise ValueError(problem)
        sizes = [size for size, _ in replies if size is not None]
        self._kept.pop(number, None)
        if sizes:
            self._kept[number] = max(sizes)
        self._checked[number] = path

    def forget(self, number: int) -> None:
        """Have an id read again when it comes again."""
        self._checked.pop(number, None)

    def base_may_be_another(self, method: str) -> None:
        """Check again what new requests name, and what those name that wait; those that began go on as they are."""
        self._checked.clear()
        self._changing = method in _CHANGING or (self._changing and method not in _CHANGED)
        if self._changing or self._core.model_executor.is_sleeping:
            return
        for request in list(self._core.scheduler.requests.values()):
            if request.lora_request is not None and request.num_computed_tokens == 0:
                try:
                    self.admit(request.lora_request)
                except Exception as error:
                    self._core.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ERROR)
                    _fail(self._core, request, str(error))

    def _over(self, in_flight: dict[int, str]) -> list[int]:
        """The ids that the workers are to drop."""
        size, over = sum(self._kept.values()), []
        for number in list(self._kept):
            if size <= self._limit:
                break
            if number not in in_flight:
                size -= self._kept.pop(number)
                self._checked.pop(number, None)
                over.append(number)
        return over


def admit_requests() -> None:
    """Put the door into vLLM: where an adapter or another base comes in, and where a refusal goes out."""
    stock = {name: getattr(EngineCore, name) for name in ("add_request", "add_lora", "remove_lora", "collective_rpc")}

    @functools.wraps(stock["add_request"])
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        if request.lora_request is not None:
            try:
                _admission(self).admit(request.lora_request)
            except Exception as error:
                _fail(self, request, str(error))
                if getattr(self, "has_coordinator", False) and hasattr(self, "current_wave"):
                    self.engines_running = True  # the other ranks may have begun a wave for this request
                return
        stock["add_request"](self, request, request_wave)

    @functools.wraps(stock["add_lora"])
    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        _admission(self).admit(lora_request, anew=True)
        return True

    @functools.wraps(stock["remove_lora"])
    def remove_lora(self: Any, lora_id: int) -> Any:
        _admission(self).forget(lora_id)
        return stock["remove_lora"](self, lora_id)

    @functools.wraps(stock["collective_rpc"])
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock["collective_rpc"](self, method, *args, **kwargs)
        patched = self.vllm_config.lora_config is not None and hasattr(self, "scheduler")
        if patched and not str(method).startswith("ksl_patch_"):
            _admission(self).base_may_be_another(str(method))
        return result

    for method in (add_request, add_lora, remove_lora, collective_rpc):
        setattr(EngineCore, method.__name__, method)

    process_outputs = OutputProcessor.process_outputs

    @functools.wraps(process_outputs)
    def processed(self: Any, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        others = [output for output in engine_core_outputs if not _refused(self, output)]
        return process_outputs(self, others, *args, **kwargs)

    OutputProcessor.process_outputs = processed


def _ordinary(path: str) -> bool:
    """Whether a path is of an adapter without trained tokens, or of something that vLLM is to fetch."""
    return not Path(path).is_file() and not peft.trains_tokens(Path(path))


def _admission(core: Any) -> Admission:
    admission: Admission | None = getattr(core, "ksl_patch_admission", None)
    if admission is None:
        admission = core.ksl_patch_admission = Admission(core)
    return admission


def _fail(core: Any, request: Any, reason: str) -> None:
    """End a request with finish reason "error", and the sentence as its stop reason."""
    logger.error("ksl_patch: request %s: %s", request.request_id, reason)
    output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=_MARK + reason)
    outputs = EngineCoreOutputs(finished_requests={request.request_id}, outputs=[output])
    if hasattr(core, "output_queue"):
        core.output_queue.put_nowait((request.client_index, outputs))
        return
    step = core.step_fn  # the engine is in its caller's process, who takes what a step gives

    def step_and_fail() -> tuple[dict[int, EngineCoreOutputs], bool]:
        core.step_fn = step
        given, executed = step()
        given = dict(given or {})
        others = given.get(request.client_index)
        if others is not None:
            others.outputs = [*outputs.outputs, *others.outputs]
        return given | {request.client_index: others or outputs}, executed

    core.step_fn = step_and_fail


def _refused(processor: Any, output: EngineCoreOutput) -> bool:
    """Hand a refusal to whoever waits for it as an error with its sentence; whether that was done.

    Who asked by `LLM.generate` has it as the stop reason of an output among others. An embedding has no such place.
    """
    reason = output.stop_reason
    if output.finish_reason != FinishReason.ERROR or not isinstance(reason, str) or not reason.startswith(_MARK):
        return False
    output.stop_reason = reason = reason.removeprefix(_MARK)
    state = processor.request_states.get(output.request_id)
    if state is None or (state.queue is None and state.detokenizer is not None):
        return False
    processor._finish_request(state)
    if state.queue is None:
        raise ValueError(reason)
    state.queue.put(VLLMValidationError(reason))
    return True
