"""transformers' continuous batching with patches: the model's `generate_batch`, and the managers that it makes.

What follows the requests of one manager is in requests.py. Blocks of the KV cache are found by their tokens alone, and
two patches must not share them: prefix sharing is switched off while patches are patched.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ksl_patch.bank import PatchBank
from ksl_patch.errors import RunError
from ksl_patch.hf.blocks import Blocks
from ksl_patch.hf.choice import Turn
from ksl_patch.hf.patched_model import PatchedModel
from ksl_patch.hf.requests import Requests
from ksl_patch.hf.wiring import Wiring

_KEPT = "_cached_continuous_batching_manager"  # where a model keeps a persistent manager


class ContinuousBatching:
    """Follows the managers that a model makes while a handle is attached to it."""

    def __init__(self, blocks: Blocks, patched: PatchedModel, bank: PatchBank) -> None:
        self._blocks, self._patched, self._model, self._bank = blocks, patched, patched.model, bank
        self._managers: weakref.WeakSet[Any] = weakref.WeakSet()

    def wire(self, wiring: Wiring) -> None:
        """Put its methods on the model."""
        wiring.wrap("init_continuous_batching", self._init_continuous_batching)
        wiring.wrap("generate_batch", self._generate_batch)

    @property
    def is_running(self) -> bool:
        """Whether a manager generates, with patches or without."""
        return any(manager.is_running() for manager in self._managers)

    def check_alone(self) -> None:
        """Raise RunError where a forward pass of this thread would run beside that of a manager.

        transformers sets `config.is_causal` for the length of a packed forward pass (`merge_with_config_defaults`), so
        that others compute without a causal mask meanwhile, and may leave it so.
        """
        for manager in self._managers:
            if manager.is_running() and not manager.background_thread_status.is_pause_requested(local=True):
                raise RunError(
                    "a manager of continuous batching runs on this model, and transformers mixes up its forward passes "
                    "with others: run this inside `manager.pause()`, or stop the manager first."
                )

    def close(self) -> None:
        """Give up a persistent manager. Managers made here refuse requests from now on."""
        if getattr(self._model, _KEPT, None) in self._managers:
            self._model.destroy_cached_continuous_batching_manager()

    def _generate_batch(self, generate: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch`, with the choice that is open or `patch=`: a name, None, or an entry for each."""
        blocks, turn = self._blocks, Turn()
        with blocks.for_call(kwargs):
            choice = blocks.choice_for_request()
            if choice is None:
                return generate(inputs, *args, **kwargs)
            choice.check_count(len(inputs))
            with blocks.choosing(replace(choice, turn=turn)):
                results = generate(inputs, *args, **kwargs)
        if turn.error is not None:  # which transformers logs, and goes on without the request
            raise turn.error
        return results

    def _init_continuous_batching(self, init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers import ContinuousBatchingConfig

        if self._blocks.static is not None:
            raise RunError("a handle with max_batch does not serve continuous batching: attach without it.")
        if getattr(self._model, "_device_mesh", None) is not None:
            raise RunError("continuous batching with patches does not run under a tensor parallel plan.")
        kept = getattr(self._model, _KEPT, None)
        if kept is not None:
            if kept not in self._managers:
                raise RunError("this model keeps a continuous batching manager from before: destroy it first.")
            return init(*args, **kwargs)
        names = ("generation_config", "continuous_batching_config", "workload_hints")
        kwargs |= dict(zip(names, args, strict=False))
        given = kwargs.get("continuous_batching_config") or getattr(
            kwargs.get("generation_config"), "continuous_batching_config", None
        )
        config = copy.copy(given) or ContinuousBatchingConfig()
        config.allow_block_sharing = False
        manager = init(**kwargs | {"continuous_batching_config": config})
        Requests(self._blocks, self._patched, self._bank, self._managers, manager)
        self._managers.add(manager)
        return manager
