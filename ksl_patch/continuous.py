"""Patches under transformers' continuous batching: `generate_batch` and its manager, a patch for each request.

A packed batch holds positions of many requests, so each position gets a slot. Blocks of the KV cache are found by
their tokens alone, and two patches must not share them: prefix sharing is switched off while patches are attached.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from ksl_patch.errors import RunError

if TYPE_CHECKING:
    from ksl_patch.hf import PatchHandle

_WRAPPED = ("init_continuous_batching", "generate_batch")


class ContinuousBatching:
    """Follows the managers that a model makes while a handle is attached to it."""

    def __init__(self, handle: PatchHandle, model: Any) -> None:
        self._handle, self._model = handle, model
        self._wrapped = [name for name in _WRAPPED if hasattr(model, name)]
        for name in self._wrapped:
            original = getattr(model, name)
            vars(model)[name] = functools.wraps(original)(functools.partial(getattr(self, f"_{name}"), original))

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name in self._wrapped:
            del vars(self._model)[name]

    def _generate_batch(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        choice = self._handle.current.get()
        if choice is not None and len(choice.slots) not in (1, len(inputs)):
            raise RunError(
                f"{len(choice.slots)} patches were chosen for {len(inputs)} prompts: give an entry for each."
            )
        with self._handle.restarted():
            return original(inputs, *args, **kwargs)

    def _init_continuous_batching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers import ContinuousBatchingConfig

        if self._handle.is_static:
            raise RunError("a handle with max_batch does not serve continuous batching: attach without it.")
        if getattr(self._model, "_device_mesh", None) is not None:
            raise RunError("continuous batching with patches does not run under a tensor parallel plan.")
        if getattr(self._model, "_cached_continuous_batching_manager", None) is not None:
            raise RunError("this model keeps a continuous batching manager from before: destroy it first.")
        names = ("generation_config", "continuous_batching_config", "workload_hints")
        kwargs |= dict(zip(names, args, strict=False))
        config = copy.copy(kwargs.get("continuous_batching_config")) or ContinuousBatchingConfig()
        config.allow_block_sharing = False
        manager = original(**kwargs | {"continuous_batching_config": config})
        _Requests(self._handle, manager)
        return manager


class _Requests:
    """The slot of every request of one manager, from its submission to its end."""

    def __init__(self, handle: PatchHandle, manager: Any) -> None:
        self._handle = handle
        self._slots: dict[str, int] = {}
        self._holds: dict[str, ExitStack] = {}
        self._batch: list[int] = []
        self._buffer: torch.Tensor | None = None
        self._manager = manager
        # The state that `add_request` makes passes through this queue, still in the thread of the caller.
        manager.input_queue.put = functools.partial(self._put, manager.input_queue.put)
        manager._create_batch_processor = functools.partial(self._create, manager._create_batch_processor)

    def _put(self, put: Callable[..., None], state: Any, *args: Any, **kwargs: Any) -> None:
        choice = self._handle.current.get()
        if choice is not None:
            entries = choice.slots.tolist()
            if len(entries) > 1:
                taken = choice.taken
                if len(taken) == len(entries):
                    raise RunError(f"{len(entries)} patches were chosen for more requests: give an entry for each.")
                slot = entries[len(taken)]
                taken.append(state.request_id)
            else:
                slot = entries[0]
            if slot:
                hold = ExitStack()
                hold.enter_context(self._handle.bank.hold([slot]))
                self._handle.opened(1)
                hold.callback(self._handle.opened, -1)
                self._slots[state.request_id], self._holds[state.request_id] = slot, hold
        put(state, *args, **kwargs)

    def _create(self, create: Callable[[], Any]) -> Any:
        processor = create()
        batch, runner, scheduler = processor.inputs_and_outputs, processor.model_runner, processor.scheduler
        batch.prepare_batch_tensors = functools.partial(self._prepare, batch.prepare_batch_tensors)
        runner.compute_batch = functools.partial(self._compute, runner.compute_batch, processor)
        for name in ("finish_request", "clear_cancelled_requests"):
            setattr(scheduler, name, functools.partial(self._ended, getattr(scheduler, name), scheduler))
        # At the end of the thread, however it came about, no request is left.
        status = self._manager.background_thread_status
        status.mark_as_stopped = functools.partial(self._stopped, status.mark_as_stopped)
        size = processor.max_batch_tokens
        self._buffer = torch.zeros(1, size, dtype=torch.int64, device=self._handle.bank.device)
        return processor

    def _prepare(self, prepare: Callable[..., None], requests_in_batch: Any, *args: Any, **kwargs: Any) -> None:
        slots = []
        for request in requests_in_batch:
            state = request.state
            slot = self._slots.get(_root(state.request_id), 0)
            start = state.position_offset
            positions = range(start, start + request.query_length)
            if self._handle.bank.is_prompt_only(slot):
                prompt = state._true_initial_tokens or len(state.initial_tokens)
                slots += [slot if position < prompt else 0 for position in positions]
            else:
                slots += [slot] * len(positions)
        prepare(requests_in_batch, *args, **kwargs)
        self._batch = slots

    def _compute(self, compute: Callable[..., None], processor: Any, model: Any, batch_data: Any) -> None:
        from transformers.generation.continuous_batching.utils import stream_context

        assert self._buffer is not None
        length = batch_data["input_ids"].shape[1]
        slots = torch.tensor(self._batch + [0] * (length - len(self._batch)))
        with stream_context(processor.inputs_and_outputs.compute_stream):
            self._buffer[0, :length].copy_(slots)
        with self._handle.packed(self._buffer[:, :length], batch_data["logits_indices"]):
            compute(model, batch_data)

    def _ended(self, original: Callable[..., Any], scheduler: Any, *args: Any) -> Any:
        before = {_root(name) for name in (*scheduler.active_requests, *scheduler.waiting_requests)}
        result = original(*args)
        self._release(before - {_root(name) for name in (*scheduler.active_requests, *scheduler.waiting_requests)})
        return result

    def _stopped(self, mark_as_stopped: Callable[[], None]) -> None:
        mark_as_stopped()
        self._release(set(self._holds))

    def _release(self, names: set[str]) -> None:
        for name in names & self._holds.keys():
            del self._slots[name]
            self._holds.pop(name).close()


def _root(request_id: str) -> str:
    """The request that a child (of `num_return_sequences`) was forked from."""
    return request_id.partition("__child#")[0]
