"""The hooks on a model: what a choice does in `generate`, in forward passes, behind the embedding and the head.

A request that was given a patch is answered with it or raises: a forward pass beside the patched modules is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ksl_patch.bank import PatchBank
from ksl_patch.errors import RunError
from ksl_patch.hf.blocks import Blocks
from ksl_patch.hf.choice import Choice, Packed, Prompt
from ksl_patch.hf.patched_model import PatchedModel
from ksl_patch.hf.wiring import Wiring
from ksl_patch.overlay import Overlay


class Hooks:
    """The hooks of one handle on its model. check_alone: raises where a manager of continuous batching runs."""

    def __init__(self, patched: PatchedModel, blocks: Blocks, bank: PatchBank, check_alone: Callable[[], None]) -> None:
        self._patched, self._blocks, self._bank, self._check_alone = patched, blocks, bank, check_alone
        self._model, self._table, self._static = patched.model, patched.table, blocks.static
        self._overlay = Overlay(patched.table, bank)
        self._uncompiled = _uncompiled()

    def wire(self, wiring: Wiring) -> None:
        """Put the hooks on the model."""
        model, table = self._model, self._table
        # Before and after first: they are to see what the model's own hooks have made of the arguments.
        wiring.hook(model.register_forward_pre_hook, self._before_forward, with_kwargs=True)
        wiring.hook(model.register_forward_hook, self._after_forward, always_call=True)
        # Those of the patched modules first too: what others make of their outputs is made of the patch's.
        for lookup in table.lookups:
            hook = functools.partial(self._on_embedding, lookup.scale)
            wiring.hook(lookup.module.register_forward_hook, hook, with_kwargs=True, prepend=True)
        if table.head is not None:
            wiring.hook(table.head.register_forward_hook, self._on_head, with_kwargs=True, prepend=True)
        for name, method in (("generate", self._generate), ("_expand_inputs_for_generation", self._expand)):
            wiring.wrap(name, method)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`, with the choice that is open or, in one call, `patch=`: a name, None, or an entry for each."""
        if not self._patched.is_attached:  # something still has this method
            return generate(*args, **kwargs)
        with self._blocks.for_call(kwargs), self._blocks.counted_running():
            choice = self._blocks.current_choice()
            self._check_alone()
            if choice is None:
                return generate(*args, **kwargs)
            assert isinstance(choice, Choice)
            names = ("inputs", "input_ids", getattr(self._model, "main_input_name", "input_ids"))
            given = next((kwargs[k] for k in names if kwargs.get(k) is not None), args[0] if args else None)
            if kwargs.get("inputs_embeds") is not None:
                raise RunError("patches act on token ids: call generate with input_ids, not with inputs_embeds.")
            columns = 1  # of what `generate` begins with by itself
            if isinstance(given, torch.Tensor):
                choice.check_count(given.shape[0])
                columns = given.shape[1]
            with self._blocks.choosing(dataclasses.replace(choice, prompt=Prompt(columns))), ExitStack() as stack:
                if self._static is not None:
                    stack.callback(self._static.fill, choice)
                return generate(*args, **kwargs)

    def _expand(self, expand: Callable[..., Any], expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Where `generate` makes several rows of each prompt, the choice gets as many."""
        choice = self._blocks.current.get()
        if isinstance(choice, Choice) and choice.prompt is not None and expand_size > 1:
            if self._static is not None:
                self._static.fill(choice, expand_size)
            self._blocks.current.set(dataclasses.replace(choice, each=expand_size))
        return expand(expand_size, *args, **kwargs)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        (self._uncompiled.begin if torch.compiler.is_compiling() else Hooks._begin)(self, args, kwargs)

    def _begin(self, args: Any, kwargs: dict[str, Any]) -> None:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            raise RunError(
                "a trace of the model would keep the choice that it was made with: detach the patches first."
            )
        if "patch" in kwargs:
            raise RunError("`patch=` is for `generate` and `generate_batch`: call the model inside `using`.")
        # Looked at itself, since nothing is chosen while a patch is merged.
        is_packed = isinstance(self._blocks.current.get(), Packed)
        if type(kwargs.get("cache")).__name__ == "PagedAttentionCache" and not is_packed:
            raise RunError("this manager of continuous batching was made before `attach`: make another one.")
        choice = self._blocks.current_choice()
        if not is_packed:
            self._check_alone()
        if choice is None:
            return
        if any(kwargs.get(name) is not None for name in ("inputs_embeds", "decoder_inputs_embeds")):
            raise RunError("patches act on token ids: call the model with input_ids, not with inputs_embeds.")
        if self._table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if self._static is None and isinstance(choice, Choice):
                raise RunError("a CUDA graph keeps the choice that it was captured with: attach with max_batch.")
        else:
            self._patched.check_unchanged()
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        is_batch = isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point()
        if self._model.config.is_encoder_decoder:
            is_batch = False  # each side has token ids of its own
        if self._static is not None and is_batch:
            self._static.rows(ids.shape[0])  # compiled code would raise what torch makes of the error
        self._blocks.current.set(choice.begin(kwargs, ids if is_batch else None))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        (self._uncompiled.end if torch.compiler.is_compiling() else Hooks._end)(self, output is not None)

    def _end(self, has_output: bool) -> None:
        choice = self._blocks.current.get()
        if choice is None or choice.seen is None:
            return
        self._blocks.current.set(dataclasses.replace(choice, seen=None))
        if not has_output:
            return  # it has failed
        choice.block.check()
        if self._static is not None:
            return  # compiled code leaves no trace
        if choice.seen.needs_embedding and not choice.seen.embedding:
            raise RunError(
                "the forward pass did not look its tokens up in the patched embedding, so no patch could act: "
                "something is in the embedding's place, or the model was given no token ids."
            )
        if choice.width and not choice.seen.head:
            raise RunError("the forward pass did not go through the patched head, so its logits are not the patch's.")

    def _on_embedding(
        self, scale: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor
    ) -> Any:
        token_ids = args[0] if args else kwargs["input"]
        if self._static is None:
            here = self._uncompiled.embedding_slots if torch.compiler.is_compiling() else Hooks._embedding_slots
            slots = here(self, token_ids)
            if slots is None:
                return None
        else:
            if not torch.compiler.is_compiling():
                self._blocks.current_choice()
                self._captured()
            slots = self._static.rows(token_ids.shape[0])
        return self._overlay.embed(slots, token_ids.to(self._table.device), output, scale)

    def _embedding_slots(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        choice = self._blocks.current_choice()
        if choice is None:
            return None
        slots = choice.embedding(token_ids)
        if choice.seen is not None:
            choice.seen.embedding = True
        return slots

    def _on_head(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        hidden = args[0] if args else kwargs["input"]
        if self._static is None:
            here = self._uncompiled.head_slots if torch.compiler.is_compiling() else Hooks._head_slots
            slots, width = here(self, hidden)
            if slots is None:
                return None
        else:
            width = self._bank.output_width
            if not width:
                return None
            slots = self._static.rows(hidden.shape[0])
        batch, d, V = slots.shape[0], hidden.shape[-1], output.shape[-1]
        # [1, ..., d] for one patch, [B, ..., d] for one each: some heads see more than rows and columns.
        flat = self._overlay.correct(slots, width, hidden.reshape(batch, -1, d), output.reshape(batch, -1, V))
        return flat.view(output.shape)

    def _head_slots(self, hidden: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        choice = self._blocks.current_choice()
        if choice is None or not choice.width:
            return None, 0
        if choice.seen is not None:
            choice.seen.head = True
        return choice.head(hidden), choice.width

    def _captured(self) -> None:
        if self._table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._bank.fix()


@functools.cache
def _uncompiled() -> SimpleNamespace:
    """The methods that torch.compile is to run and not to trace: they look at the thread's choice.

    Of the class and not of an instance, which would then hold itself, and the bank, beyond its last user.
    """
    reason = "the choice is looked up outside compiled code: compile model.forward, and not the model"
    return SimpleNamespace(**{
        name: torch.compiler.disable(getattr(Hooks, f"_{name}"), reason=reason)  # type: ignore[no-untyped-call]
        for name in ("begin", "end", "embedding_slots", "head_slots")
    })  # fmt: skip
