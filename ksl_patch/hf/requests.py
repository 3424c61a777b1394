"""The requests of one manager of continuous batching: the slot of each, from its choice to its end.

A packed batch holds positions of many requests, so each position gets a slot. A request carries its slot itself, and
whatever transformers makes of the request has it too: it may be forked, and offloaded and begun again.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ksl_patch.bank import PatchBank
from ksl_patch.errors import RunError
from ksl_patch.hf.blocks import Blocks
from ksl_patch.hf.choice import Choice
from ksl_patch.hf.patched_model import PatchedModel


@dataclass(eq=False)
class _Family:
    """The names that a request and what it is forked into have in results, taken until the last of them has ended."""

    names: set[str]
    members: int = 0


class _Use:
    """A request's hold on its slot, let go of when the request has ended, or when nobody has the request any more.

    Nothing here waits for a lock, since a finaliser may run it at any point.
    """

    def __init__(self, requests: Requests, slot: int, family: _Family, *, counts: bool) -> None:
        self.requests, self.slot, self.family, self._counts = requests, slot, family, counts
        self._is_open = False
        self._hold = ExitStack()
        self._hold.enter_context(requests.bank.hold([slot], requests.stream))
        self._is_open = True
        family.members += 1
        if counts:
            requests.blocks.requests.add(id(self))

    def __deepcopy__(self, memo: Any) -> _Use:
        return _Use(self.requests, self.slot, self.family, counts=self._counts)

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._hold.close()
        self.requests.blocks.requests.discard(id(self))
        self.family.members -= 1
        if not self.family.members:
            self.requests.names.difference_update(self.family.names)

    __del__ = close


@functools.cache
def _served_state() -> Any:
    """transformers' state of a request, with the `use` of its slot; imported when it is needed."""
    from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

    class ServedState(RequestState):  # type: ignore[misc]
        use: _Use

        @property
        def status(self) -> Any:
            return self._status

        @status.setter
        def status(self, value: Any) -> None:
            RequestState.status.fset(self, value)
            if value >= RequestStatus.FINISHED:
                self.use.close()

        @property
        def has_ended(self) -> bool:
            return bool(self._status >= RequestStatus.FINISHED)

        def create_equivalent_initial_request(self) -> Any:
            new = super().create_equivalent_initial_request()
            return _serve(new, copy.deepcopy(self.use))

    return ServedState


def _serve(state: Any, use: _Use) -> Any:
    state.__class__ = _served_state()
    state.use = use
    return state


@dataclass(eq=False)
class _Processor:
    """What follows one batch processor: the slots of the batch, and its device buffer, int64 [1, max_batch_tokens].

    Graphs read the buffer, the bank as it was in that generation, and so many rows of a slot's head.
    """

    buffer: torch.Tensor
    generation: int
    width: int = 0
    slots: list[int] = field(default_factory=list)


class Requests:
    """The requests of one manager.

    blocks, bank: of the handle that the manager was made with. names: of requests that wait or run, and of what they
    may be forked into.
    """

    def __init__(
        self,
        blocks: Blocks,
        patched: PatchedModel,
        bank: PatchBank,
        others: weakref.WeakSet[Any],
        manager: Any,
    ) -> None:
        self.blocks, self.bank, self._patched = blocks, bank, patched
        self.names: set[str] = set()
        self._others, self._stream = others, None
        self._lock = threading.Lock()
        self._entry: ContextVar[tuple[Choice | None, int] | None] = ContextVar("ksl_patch_entry", default=None)
        self._processors: weakref.WeakKeyDictionary[Any, _Processor] = weakref.WeakKeyDictionary()
        for name in ("add_request", "add_requests", "start", "destroy", "_create_batch_processor"):
            method = getattr(self, f"_{name.strip('_')}")
            setattr(manager, name, functools.partial(method, getattr(manager, name), weakref.proxy(manager)))
        # The state that `add_request` makes passes through this queue, still in the thread of the caller.
        manager.input_queue.put = functools.partial(self._put, manager.input_queue.put)

    def stream(self) -> Any:
        """The CUDA stream that computes, None before there is one and on a CPU."""
        return self._stream

    def _add_request(self, add: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
        """An entry of a choice is this request's, whatever becomes of it. `patch=` chooses for this request alone."""
        with self.blocks.for_call(kwargs):
            return self._added(add, *args, **kwargs)

    def _added(self, add: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        choice = self.blocks.choice_for_request()
        slot = 0
        if choice is not None:
            with self._lock:
                taken, choice.turn.taken = choice.turn.taken, choice.turn.taken + 1
            if not choice.is_single and taken >= len(choice.slots):
                count = len(choice.slots)
                choice.turn.error = RunError(f"{count} patches were chosen for more requests: give an entry for each.")
                raise choice.turn.error
            slot = int(choice.slots[0 if choice.is_single else taken])
        here = self._entry.set((choice, slot))
        try:
            return add(*args, **kwargs)
        except Exception as error:
            if choice is not None:
                choice.turn.error = error
            raise
        finally:
            self._entry.reset(here)

    def _add_requests(self, add: Callable[..., Any], manager: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.blocks.for_call(kwargs):
            choice = self.blocks.choice_for_request()
            if choice is not None:
                choice.check_count(len(inputs))
            return add(inputs, *args, **kwargs)

    def _put(self, put: Callable[..., None], state: Any, *args: Any, **kwargs: Any) -> None:
        choice, slot = self._entry.get() or (self.blocks.choice_for_request(), 0)
        name = state.request_id
        names = {name, *(f"{name}__child#{child}" for child in range(state.num_children))}
        with self._lock:
            if names & self.names:
                raise RunError(f"a request named {min(names & self.names)} waits or runs already: choose another name.")
            self.names |= names
        family = _Family(names)
        try:
            use = _Use(self, slot, family, counts=choice is not None)
        except BaseException:
            self.names -= names
            raise
        try:
            if choice is not None:
                choice.block.check()  # only now is it certain that the slot is still the choice's
            put(_serve(state, use), *args, **kwargs)
        except BaseException:
            use.close()
            raise

    def _start(self, start: Callable[[], None], manager: Any) -> None:
        if self.blocks.running:
            raise RunError("the model generates already: start the manager when that is done.")
        self._check_only(manager)
        start()

    def _check_only(self, manager: Any) -> None:
        if any(other.is_running() for other in self._others if other.input_queue is not manager.input_queue):
            raise RunError(
                "another manager of continuous batching runs on this model, and transformers mixes up their forward "
                "passes: stop it first."
            )

    def _destroy(self, destroy: Callable[[], None], manager: Any) -> None:
        """Requests that wait in a manager which nobody will start have ended."""
        destroy()
        while not manager.input_queue.empty():
            state = manager.input_queue.get_nowait()
            state.use.close()

    def _create_batch_processor(self, create: Callable[[], Any], manager: Any) -> Any:
        if not self._patched.is_attached:
            raise RunError("the handle that this manager was made with is detached: make another manager.")
        self._check_only(manager)
        processor = create()
        if processor in self._processors:
            return processor
        size, bank = processor.max_batch_tokens, self.bank
        with torch.inference_mode(False):
            buffer = torch.zeros(1, size, dtype=torch.int64, device=bank.device)
        followed = self._processors[processor] = _Processor(buffer, bank.generation)
        batch, runner, scheduler = processor.inputs_and_outputs, processor.model_runner, processor.scheduler
        self._stream = batch.compute_stream
        batch.prepare_batch_tensors = functools.partial(self._prepare, batch.prepare_batch_tensors, followed)
        runner.compute_batch = functools.partial(self._compute, runner.compute_batch, runner, followed)
        scheduler.clear_cancelled_requests = functools.partial(_cancelled, scheduler.clear_cancelled_requests)
        return processor

    def _prepare(
        self, prepare: Callable[..., None], followed: _Processor, requests_in_batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        slots, is_prompt_only = [], self.bank.is_prompt_only
        for request in requests_in_batch:
            state, length = request.state, request.query_length
            use = getattr(state, "use", None)  # warm-up has none
            slot = 0 if use is None or state.has_ended else use.slot
            if slot and is_prompt_only(slot):
                prompt = state._true_initial_tokens or len(state.initial_tokens)
                inside = min(max(prompt - state.position_offset, 0), length)
                slots += [slot] * inside + [0] * (length - inside)
            else:
                slots += [slot] * length
        prepare(requests_in_batch, *args, **kwargs)
        followed.slots = slots

    def _compute(
        self, compute: Callable[..., None], runner: Any, followed: _Processor, model: Any, batch_data: Any
    ) -> None:
        from transformers.generation.continuous_batching.utils import stream_context

        bank, stream = self.bank, runner.inputs_and_outputs.compute_stream
        graphs = runner.use_cuda_graph_varlen or runner.use_cuda_graph_decode
        width = max(bank.output_width, followed.width) if graphs else bank.width_of(set(followed.slots))
        if graphs and (bank.generation, width) != (followed.generation, followed.width):
            _drop_graphs(runner.inputs_and_outputs)
            followed.generation, followed.width = bank.generation, width
        bank.wait_for_writes(stream)
        length = batch_data["input_ids"].shape[1]
        slots = torch.tensor(followed.slots + [0] * (length - len(followed.slots)), pin_memory=stream is not None)
        with stream_context(stream):
            followed.buffer[0, :length].copy_(slots, non_blocking=True)
        kept = batch_data["logits_indices"] if runner.supports_logits_to_keep(model) else None
        with self.blocks.packed(followed.buffer[:, :length], kept, width):
            compute(model, batch_data)


def _cancelled(clear: Callable[[], Any]) -> Any:
    """The requests that were cancelled get no terminal state: their slots are given up here."""
    states = clear()
    for state in states:
        state.use.close()
    return states


def _drop_graphs(io: Any) -> None:
    """Forget the graphs that read the bank's old tensors, once they have run; they are captured again when needed."""
    pairs = getattr(io, "io_pairs", None)
    if io.compute_stream is not None:
        io.compute_stream.synchronize()
    for each in [io] if pairs is None else [pair.device_io for pair in pairs]:
        each.graphs = type(each.graphs)()
