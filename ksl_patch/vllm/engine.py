"""The engine's door: a request joins the others once every worker has read and checked its patch, or fails by itself.

vLLM reads an adapter inside the step that needs it first, where an error ends the engine.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore

from ksl_patch.vllm.settings import read_settings

logger = logging.getLogger("vllm.ksl_patch")


class Admission:
    """What the workers of one engine have read and keep, by adapter id and path.

    They keep up to `kept_bytes` of the settings, beyond which what has waited longest goes, save what a request in
    flight needs.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._limit = read_settings(core.vllm_config.additional_config).kept_bytes
        self._kept: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._checked: set[tuple[int, str]] = set()

    def admit(self, request: LoRARequest, *, by_request: bool = False) -> None:
        """Have the workers read what a request names, if they have not. Raises ValueError, one sentence.

        by_request: an ordinary adapter is loaded as well, lest it fail in the step that wants it.
        """
        number, path = key = request.lora_int_id, request.lora_path
        if key in self._checked and (by_request or not request.load_inplace):
            if key in self._kept:
                self._kept.move_to_end(key)
            return
        in_flight = {
            other.lora_request.lora_int_id: other.lora_request.lora_path
            for other in self._core.scheduler.requests.values()
            if other.lora_request is not None
        }
        if in_flight.get(number, path) != path and not request.load_inplace:
            raise ValueError(f"{path} and {in_flight[number]} were given one adapter id, {number}.")
        if self._core.model_executor.is_sleeping:
            raise ValueError(f"{request.lora_name}: the engine sleeps, and its base cannot be read: wake it up first.")
        replies = self._core.model_executor.collective_rpc("ksl_patch_read", args=(request, self._over(in_flight)))
        for reply in replies:
            if isinstance(reply, str):
                raise ValueError(reply)
        sizes = [reply for reply in replies if reply is not None]
        if sizes:
            self._kept[key] = max(sizes)
        elif by_request:
            self._core.model_executor.add_lora(request)
        self._checked.add(key)

    def check_again(self) -> None:
        """Have what new requests name checked again: the base may be another. Those in flight go on as they are."""
        self._checked.clear()

    def _over(self, in_flight: dict[int, str]) -> list[int]:
        """The ids that the workers are to drop."""
        size, over = sum(self._kept.values()), []
        for key in list(self._kept):
            if size <= self._limit:
                break
            if key[0] not in in_flight:
                size -= self._kept.pop(key)
                self._checked.discard(key)
                over.append(key[0])
        return over


def admit_requests() -> None:
    """Put the door into vLLM's engine: its three methods by which an adapter, or another base, comes in."""
    add_request, add_lora, collective_rpc = EngineCore.add_request, EngineCore.add_lora, EngineCore.collective_rpc

    @functools.wraps(add_request)
    def adding(self: Any, request: Any, request_wave: int = 0) -> None:
        if request.lora_request is not None:
            try:
                _admission(self).admit(request.lora_request, by_request=True)
            except Exception as error:
                logger.error("ksl_patch: request %s: %s", request.request_id, error)
                _fail(self, request, str(error))
                return
        add_request(self, request, request_wave)

    @functools.wraps(add_lora)
    def adding_lora(self: Any, lora_request: LoRARequest) -> Any:
        _admission(self).admit(lora_request)
        return add_lora(self, lora_request)

    @functools.wraps(collective_rpc)
    def calling(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(method).startswith("ksl_patch_"):
            _admission(self).check_again()
        return collective_rpc(self, method, *args, **kwargs)

    EngineCore.add_request, EngineCore.add_lora, EngineCore.collective_rpc = adding, adding_lora, calling


def _admission(core: Any) -> Admission:
    admission: Admission | None = getattr(core, "ksl_patch_admission", None)
    if admission is None:
        admission = core.ksl_patch_admission = Admission(core)
    return admission


def _fail(core: Any, request: Any, reason: str) -> None:
    """End a request with finish reason "error", and the sentence as its stop reason."""
    output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=reason)
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
            outputs.outputs += others.outputs
            others.outputs = outputs.outputs
        return given | {request.client_index: others or outputs}, executed

    core.step_fn = step_and_fail
