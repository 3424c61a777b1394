"""The handle: patches on a transformers model, loaded, chosen, replaced and unloaded by name.

A request that was given a patch is answered with it or raises. So whatever cannot be followed is refused: a choice
outside its block, a forward past the patched embedding, a model that was changed after `attach`.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import io
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from ksl_patch.bank import PatchBank
from ksl_patch.base import find_embedding
from ksl_patch.base.digest import tokenizer_digest, weights_digest
from ksl_patch.base.identity import check_head
from ksl_patch.base.table import innermost
from ksl_patch.base.tensors import dtype_name
from ksl_patch.errors import RunError
from ksl_patch.hf.choice import Block, Choice, Packed, Prompt, StaticChoice
from ksl_patch.hf.continuous import ContinuousBatching
from ksl_patch.hf.wiring import Wiring
from ksl_patch.overlay import Overlay, slot_rows
from ksl_patch.patch import Patch, PatchMeta
from ksl_patch.patch.names import check_name
from ksl_patch.store.local import load, stored_name

Names = str | Sequence[str | None] | None
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Loaded:
    """What a name stands for."""

    slot: int
    digest: str
    meta: PatchMeta


@dataclass(frozen=True)
class _Merged:
    """What a merge has overwritten: the rows of the table at token_ids, and the tied head's weight if it was untied.

    merged_rows, head_weight: what there is in their place.
    """

    name: str
    token_ids: torch.Tensor
    rows: torch.Tensor
    merged_rows: torch.Tensor
    tied: Any
    head_weight: Any
    tie_word_embeddings: Any


def attach(
    model: Any,
    *,
    tokenizer: Any = None,
    capacity: int = 0,
    output_width: int = 0,
    budget: int | None = None,
    evict: bool = False,
    max_batch: int | None = None,
    strict: bool = False,
) -> PatchHandle:
    """Make a transformers model serve patches by name, another one for every row of a batch.

    tokenizer: given, patches whose ids are other tokens of it are refused too.
    capacity, output_width, budget, evict: of the bank (`PatchBank`).
    max_batch: for torch.compile and CUDA graphs. The choice is then kept in one device buffer of that many rows,
        so that nothing is compiled or captured again, and one `using` block is open at a time. Without it every
        thread has a choice of its own.
    strict: whatever runs without a choice raises; the base is chosen with None. Without it that is the base's, but
        still raises while some other thread or task has a block open, since its choice may have been meant.

    The model's own weights are not touched; PEFT's LoRA adapters on it keep working. Copies of the model and files of
    it are the base. Raises RunError when patches are attached already, BaseMismatchError when the model has no
    embedding to patch; the model is then as it was.
    """
    bank = {"capacity": capacity, "output_width": output_width, "budget": budget, "evict": evict}
    return PatchHandle(model, tokenizer, max_batch, strict, bank)


class PatchHandle:
    """The patches of one model: load, use, replace, unload, and in the end detach.

    bank: the PatchBank behind it. current: the choice of this thread or task.

    A choice belongs to the thread (and task) that made it. `bind` hands one over to another thread, or to a generator
    whose steps others run. What a block began with stays the same to its end, whatever is replaced or unloaded
    meanwhile.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch: int | None, strict: bool, bank: dict[str, Any]) -> None:
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
            raise RunError(f"patches are attached to a model of transformers, and this is a {type(model).__name__}.")
        base: Any = model
        self._model = base.get_base_model() if hasattr(base, "get_base_model") else base
        if "ksl_patch" in vars(self._model):
            raise RunError("patches are attached to this model already: use that handle, or detach it first.")
        self._tokenizer = tokenizer
        self._vocabulary = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._weights = functools.cache(functools.partial(weights_digest, model))  # read with the first patch
        self._table = table = find_embedding(self._model)
        if any("ksl_patch" in vars(lookup.module) for lookup in table.lookups):
            raise RunError("patches are attached to a part of this model, or to what it is a part of, already.")
        self.bank = PatchBank(table.vocab_size, table.hidden_size, dtype=table.dtype, device=table.device, **bank)
        self._overlay = Overlay(table, self.bank)
        self._strict = strict
        self._lock = threading.RLock()
        self._loaded: dict[str, _Loaded] = {}
        # Sets, which a finaliser may change at any point: `using` blocks that are open, requests of continuous batching
        # that somebody chose for, calls of `generate`.
        self._blocks: set[Block] = set()
        self.requests: set[Any] = set()
        self._running: set[object] = set()
        self._merged: _Merged | None = None
        self.current: ContextVar[Choice | Packed | None] = ContextVar("ksl_patch_choice", default=None)
        self._static = None if max_batch is None else StaticChoice(max_batch, table.device)
        self._weight = table.weight if table.plain else None
        self._state = _state(self._weight)
        # What torch.compile is to run and not to trace: it looks at the thread's choice.
        reason = "the choice is looked up outside compiled code: compile model.forward, and not the model"
        self._uncompiled = SimpleNamespace(**{
            name: torch.compiler.disable(getattr(self, f"_{name}"), reason=reason)  # type: ignore[no-untyped-call]
            for name in ("begin", "end", "embedding_slots", "head_slots")
        })  # fmt: skip
        self._wiring = Wiring(self._model)
        with self._wiring.undone_on_error() as wiring:
            # Before and after first: they are to see what the model's own hooks have made of the arguments.
            wiring.hook(self._model.register_forward_pre_hook, self._before_forward, with_kwargs=True)
            wiring.hook(self._model.register_forward_hook, self._after_forward, always_call=True)
            # Those of the patched modules first too: what others make of their outputs is made of the patch's.
            for lookup in table.lookups:
                hook = functools.partial(self._on_embedding, lookup.scale)
                wiring.hook(lookup.module.register_forward_hook, hook, with_kwargs=True, prepend=True)
                if lookup.module is not self._model:
                    wiring.set(lookup.module, "ksl_patch", self)
            if table.head is not None:
                wiring.hook(table.head.register_forward_hook, self._on_head, with_kwargs=True, prepend=True)
            wiring.set(self._model, "ksl_patch", self)
            for name, method in (("generate", self._generate), ("_expand_inputs_for_generation", self._expand)):
                wiring.wrap(name, method)
            self._continuous = ContinuousBatching(self, self._model, wiring)
            for lookup in table.lookups:
                wiring.own_class(lookup.module)
            if table.head is not None:
                wiring.own_class(table.head)
            wiring.copy_without()

    def __repr__(self) -> str:
        loaded = ", ".join(f"{name} {each.digest[:12]}" for name, each in list(self._loaded.items())) or "no patches"
        state = "" if self.is_attached else ", detached"
        return f"<PatchHandle of {type(self._model).__name__}{state}: {loaded}>"

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def names(self) -> list[str]:
        """The names of the loaded patches."""
        return list(self._loaded)

    @property
    def merged(self) -> str | None:
        """The name of the patch that is written into the model's table."""
        return None if self._merged is None else self._merged.name

    def digest(self, name: str) -> str:
        """The content that a name stands for now."""
        return self._find(name).digest

    def meta(self, name: str) -> PatchMeta:
        """What a loaded patch says of itself, its template for one."""
        return self._find(name).meta

    def load(self, patch: Patch | str | os.PathLike[str], name: str | None = None) -> str:
        """Load a patch under a name, by default the store's where it was named so, else its own; returns the name.

        patch: one, or what the command line takes for one: a path, a name or digest of the local store, or
        hf://ORG/REPO/FILE.

        Raises PatchError for a bad file, BaseMismatchError for a patch of another base, BankError when the bank is
        full, RunError for a name that is taken.
        """
        stored = stored_name(patch) if isinstance(patch, str) else None
        patch = self._read(patch)
        name = check_name(name or stored or patch.meta.name)
        with self._lock:
            self._attached()
            if name in self._loaded:
                raise RunError(f"a patch named {name} is loaded already: replace it, or choose another name.")
            self._loaded[name] = _Loaded(self.bank.add(slot_rows(patch)), patch.digest, patch.meta)
        return name

    def replace(self, name: str, patch: Patch | str | os.PathLike[str]) -> None:
        """Put another patch behind a name. Blocks that are open keep the old one; new ones get the new one."""
        patch = self._read(patch)
        with self._lock:
            old = self._find(name)
            self._loaded[name] = _Loaded(self.bank.replace(old.slot, slot_rows(patch)), patch.digest, patch.meta)

    def unload(self, name: str) -> None:
        """Forget a name. Its rows leave the bank when the last block that uses them ends."""
        with self._lock:
            self.bank.remove(self._find(name).slot)
            del self._loaded[name]

    def using(self, names: Names) -> AbstractContextManager[None]:
        """A `with` block in which the model answers with patches: one name for all rows, or an entry for each.

        None is the base. A list has one entry for each prompt that `generate` or `generate_batch` gets, or for each
        row of a forward call. The block is this thread's, or this task's: see `bind` for others. Raises RunError for
        an unknown name, before anything is computed, and in whatever still runs when the block has ended.
        """
        return _Using(lambda opener: self._opened_here(names, opener))

    @contextmanager
    def _opened_here(self, names: Names, opener: FrameType | None = None) -> Iterator[None]:
        with self._opened(lambda: self._slots(names), opener) as choice, self.chosen(choice):
            yield

    @contextmanager
    def serving(self, slots: int | Sequence[int]) -> Iterator[None]:
        """As `using`, by slots of the bank."""
        single = isinstance(slots, int)
        wanted: list[int] = [slots] if isinstance(slots, int) else list(slots)
        with self._opened(lambda: (wanted, single)) as choice, self.chosen(choice):
            yield

    def bind(self, names: Names) -> Callable[[F], F]:
        """Hand a choice over: `bind("es")(function)` runs with it in whatever thread, task or context it is called.

        So `Thread(target=handle.bind("es")(model.generate), kwargs=...)` answers in Spanish, and so does every step of
        a generator, iterator or coroutine that the function returns. Each call is a block of its own, and so is what
        it returns to be run later. A name is looked up anew in each call. Also a decorator. Raises RunError for an
        unknown name, at once and when a call begins.
        """
        with self._lock:
            self._slots(names)

        def decorate(function: Any) -> Any:
            def bound(*args: Any, **kwargs: Any) -> Any:
                with self.using(names):
                    result = function(*args, **kwargs)
                if isinstance(result, AsyncGenerator):
                    return self._async_steps(names, result)
                if inspect.iscoroutine(result):
                    return self._awaited(names, result)
                is_lazy = isinstance(result, Iterator) and not isinstance(result, io.IOBase)
                return self._steps(names, result) if is_lazy else result

            async def bound_task(*args: Any, **kwargs: Any) -> Any:
                return await bound(*args, **kwargs)

            wrapper = bound_task if inspect.iscoroutinefunction(function) else bound
            return functools.update_wrapper(wrapper, function) if hasattr(function, "__name__") else wrapper

        return decorate

    async def _awaited(self, names: Names, coroutine: Any) -> Any:
        with self.using(names):
            return await coroutine

    @contextmanager
    def marking(self, mask: torch.Tensor) -> Iterator[None]:
        """A `with` block that says which positions of forward passes are the prompt's, for patches of scope "prompt".

        mask: bool [B, T], True where the prompt is, for forward passes of that shape. `generate` needs none. Raises
        RunError outside `using`.
        """
        choice = self._choice()
        if not isinstance(choice, Choice):
            raise RunError("a prompt is marked inside a `using` block.")
        with self.chosen(dataclasses.replace(choice, mask=mask.to(self._table.device, torch.bool))):
            yield

    def merge(self, name: str) -> None:
        """Write a patch into the model's own table: no overlay, no cost, one patch for everybody.

        A tied head that the patch leaves alone gets a table of its own while it lasts. `unmerge` and `detach` undo it
        bit for bit. Raises RunError while anything is served, while another patch is merged, and for a patch of
        scope "prompt".
        """
        with self._lock:
            loaded = self._find(name)
            self._nothing_runs(f"{name} cannot be merged")
            if self._merged is not None:
                raise RunError(f"{self._merged.name} is merged into the model: unmerge it first.")
            if loaded.meta.scope == "prompt":
                raise RunError(f"{name} acts on the prompt only, so it cannot be written into the table.")
            self._check_model()
            weight, head = self._table.weight, self._table.head
            with self.bank.hold([loaded.slot]):
                token_ids, rows, output_rows = self.bank.contents(loaded.slot)
            if output_rows is not None and not self._table.tied:
                raise RunError(f"{name} changes the head too, and this model's is not tied: serve it with `using`.")
            tied, tie = None, getattr(self._model.config, "tie_word_embeddings", None)
            if self._table.tied and output_rows is not rows:
                assert head is not None
                if self._model.config.is_encoder_decoder:
                    raise RunError(f"{name} leaves the head alone, which this encoder-decoder shares: use `using`.")
                tied, head.weight = head.weight, nn.Parameter(weight.detach().clone(), requires_grad=False)
                self._model.config.tie_word_embeddings = False  # what is saved meanwhile has two tables
                if output_rows is not None:
                    head.weight.data[token_ids] = output_rows
            self._merged = _Merged(
                name, token_ids, weight.detach()[token_ids].clone(), rows, tied, head and head.weight, tie
            )
            weight.data[token_ids] = rows

    def unmerge(self) -> None:
        """Give the table its own rows back. Raises RunError when nothing is merged, or while anything is served."""
        with self._lock:
            if self._merged is None:
                raise RunError("no patch is merged.")
            self._nothing_runs(f"{self._merged.name} cannot be taken out")
            merged, head = self._merged, self._table.head
            weight: torch.Tensor = innermost(self._model.get_input_embeddings()).weight
            if (
                weight is not self._weight
                or (merged.tied is not None and (head is None or head.weight is not merged.head_weight))
                or not any(torch.equal(weight.detach()[merged.token_ids], r) for r in (merged.merged_rows, merged.rows))
            ):
                raise RunError(
                    f"the model's table was changed while {merged.name} was merged, so the patch cannot be taken out: "
                    "undo that change (unmerge what was merged after it), or load the base anew."
                )
            self._table.weight.data[merged.token_ids] = merged.rows
            if merged.tied is not None:
                assert head is not None
                head.weight = merged.tied
                self._model.config.tie_word_embeddings = merged.tie_word_embeddings
            self._merged = None

    def detach(self) -> None:
        """Leave the model as it was, bit for bit. Raises RunError while anything is served; does nothing twice."""
        with self._lock:
            if "ksl_patch" not in vars(self._model):
                return
            if self._blocks or self.requests:
                gc.collect()  # what nobody has any more
            self._nothing_runs("cannot detach")
            self._continuous.close()
            if self._merged is not None:
                self.unmerge()
            self._wiring.undo()
            for loaded in self._loaded.values():
                self.bank.remove(loaded.slot)
            self._loaded.clear()

    # For continuous batching

    def chosen_here(self) -> Choice | None:
        """The choice that a request made here gets. Raises RunError as a forward pass here would."""
        self._attached()
        choice = self._choice()
        assert not isinstance(choice, Packed)
        return choice

    def for_call(self, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """The `using` block of one call that was given `patch=`, which is taken out of its arguments."""
        return self.using(kwargs.pop("patch")) if "patch" in kwargs else nullcontext()

    def packed(self, positions: torch.Tensor, kept: torch.Tensor | None, width: int) -> AbstractContextManager[None]:
        """A `with` block for a packed batch: the slot of each position, int64 [1, T]; the head sees `kept` of them."""
        return self.chosen(Packed(Block(), positions, width, kept))

    @contextmanager
    def chosen(self, choice: Choice | Packed | None) -> Iterator[None]:
        """A `with` block of this choice. Blocks may end in another order or context than they began in."""
        before = self.current.get()
        self.current.set(choice)
        try:
            yield
        finally:
            now = self.current.get()
            if now is not None and choice is not None and now.block is choice.block:
                is_over = before is not None and not before.block.is_open
                self.current.set(None if is_over else before)

    @property
    def is_attached(self) -> bool:
        """Whether the model still serves this handle's patches."""
        return vars(self._model).get("ksl_patch") is self

    @property
    def is_generating(self) -> bool:
        """Whether a call of `generate` is under way."""
        return bool(self._running)

    @property
    def is_static(self) -> bool:
        """Whether the choice is kept in one device buffer (`max_batch`)."""
        return self._static is not None

    # Choosing

    def _slots(self, names: Names) -> tuple[list[int], bool]:
        """The slots of names, and whether it is one for all rows."""
        single = names is None or isinstance(names, str)
        wanted: Any = [names] if single else names
        if isinstance(wanted, Iterable):
            wanted = list(wanted)
        if not isinstance(wanted, list) or not wanted:
            raise RunError("no patch was chosen: give a name, None for the base, or an entry for each row.")
        return [0 if name is None else self._find(name).slot for name in wanted], single

    @contextmanager
    def _opened(
        self, resolve: Callable[[], tuple[list[int], bool]], opener: FrameType | None = None
    ) -> Iterator[Choice]:
        with ExitStack() as stack:
            with self._lock:
                self._attached()
                if self._merged is not None:
                    raise RunError(f"{self._merged.name} is merged into the model: unmerge it before choosing patches.")
                if self._static is not None and self._blocks:
                    raise RunError("a handle with max_batch serves one batch at a time: another block is open.")
                self._check_model()
                slots, single = resolve()
                stack.enter_context(self.bank.hold(slots))
                choice = self._choice_of(slots, single, opener)
                self._blocks.add(choice.block)
                stack.callback(self._blocks.discard, choice.block)
            stack.callback(choice.block.close)
            if self._static is not None:
                stack.callback(self._static.clear)
                self._static.fill(choice)
            yield choice
            if not single and 0 < choice.turn.taken < len(slots):
                made = f"{choice.turn.taken} requests made of them: give an entry for each."
                raise RunError(f"{len(slots)} patches were chosen and {made}")

    def _choice_of(self, slots: list[int], single: bool, opener: FrameType | None = None) -> Choice:
        device = self._table.device
        after = None
        if any(map(self.bank.is_prompt_only, slots)):
            after = torch.tensor([0 if self.bank.is_prompt_only(slot) else slot for slot in slots], device=device)
        block = Block(opener=opener)
        return Choice(block, torch.tensor(slots, device=device), self.bank.width_of(slots), single, after)

    def _choice(self) -> Choice | Packed | None:
        """The choice that holds here, None for the base where nobody chose."""
        choice = self.current.get()
        if self._merged is not None:
            return None  # which everybody is answered with
        if choice is not None:
            choice.block.check()
        elif self._strict:
            raise RunError("no patch was chosen, and the handle is strict: choose one with `using`, or None.")
        elif self._blocks:
            raise RunError(
                "no patch was chosen in this thread or task, while another one has a `using` block open: hand its "
                "choice over with `handle.bind(name)(function)`, or choose the base with `using(None)`."
            )
        return choice

    def _steps(self, names: Names, generator: Any) -> Any:
        """A generator whose every step runs with a choice, whatever context runs it; between them nothing is chosen."""
        with self._opened(lambda: self._slots(names)) as choice, ExitStack() as stack:
            if hasattr(generator, "close"):
                stack.callback(generator.close)
            steps, sent = iter(generator), None
            while True:
                with self.chosen(choice):
                    try:
                        item = next(steps) if sent is None else steps.send(sent)
                    except StopIteration as end:
                        return end.value
                sent = yield item

    async def _async_steps(self, names: Names, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
        with self._opened(lambda: self._slots(names)) as choice:
            try:
                while True:
                    with self.chosen(choice):
                        try:
                            item = await anext(generator)
                        except StopAsyncIteration:
                            return
                    yield item
            finally:
                await generator.aclose()

    def _find(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            raise RunError(f"no patch named {name!r} is loaded; loaded are: {', '.join(self._loaded) or 'none'}.")
        return loaded

    def _attached(self) -> None:
        if not self.is_attached:
            raise RunError("the handle is detached from its model: attach again.")

    def _nothing_runs(self, what: str) -> None:
        if self._blocks:
            raise RunError(
                f"{what} while a `using` block or a bound generator is open ({len(self._blocks)} in all): end it, or "
                "close the generator."
            )
        if self.requests:
            raise RunError(
                f"{what} while {len(self.requests)} requests of continuous batching wait or run: stop their manager, "
                "or destroy one that was never started."
            )
        if self._running or self._continuous.is_running:
            raise RunError(f"{what} while the model generates: wait for it, or stop its managers.")

    def _read(self, patch: Patch | str | os.PathLike[str]) -> Patch:
        if not isinstance(patch, Patch):
            patch = load(patch) if isinstance(patch, str) else Patch.load(patch)
        if self._merged is not None:
            raise RunError(f"{self._merged.name} is merged into the model's table: unmerge it before loading others.")
        self._check_model()
        patch.check_table(self._table)
        if self._tokenizer is not None:
            patch.check_vocabulary(self._tokenizer, self._vocabulary, stacklevel=4)
        patch.check_body(self._model, self._weights, stacklevel=4)
        if patch.meta.side == "input+output":
            check_head(patch.meta.base, patch.token_ids, patch.base_rows, self._table)
        if patch.meta.scope == "prompt" and (self._static is not None or self._model.config.is_encoder_decoder):
            where = "with max_batch" if self._static is not None else "on an encoder-decoder"
            raise RunError(f"{patch.meta.name} has scope 'prompt', which is not served {where}.")
        return patch

    def _check_model(self) -> None:
        """Raise unless the model still looks its tokens up where `attach` found it, in the same table."""
        table = self._table
        module = innermost(self._model.get_input_embeddings())
        weight = self._weight
        if module is not table.lookups[0].module or (
            weight is not None and (module.weight is not weight or len(weight) != table.vocab_size)
        ):
            raise RunError("the model's input embedding was replaced after `attach`: detach, and attach again.")
        if weight is not None and self._merged is None and _state(weight) != self._state:
            if (weight.dtype, weight.device) == (table.dtype, table.device):
                raise RunError("the model's table was changed after `attach`: detach, attach again, and load again.")
            raise RunError(
                f"the model was moved to {dtype_name(weight.dtype)} on {weight.device} after `attach`, "
                f"which found {dtype_name(table.dtype)} on {table.device}: detach, and attach again."
            )
        if self._merged is None and table.head is not None:
            head = innermost(self._model.get_output_embeddings())
            if head is not table.head or (table.tied and head.weight is not module.weight):
                raise RunError("the model's head was replaced after `attach`: detach, and attach again.")

    # On the model

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`, with the choice that is open or, in one call, `patch=`: a name, None, or an entry for each."""
        if not self.is_attached:  # something still has this method
            return generate(*args, **kwargs)
        with self.for_call(kwargs), self._counted_running():
            choice = self._choice()
            self._continuous.check_alone()
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
            with self.chosen(dataclasses.replace(choice, prompt=Prompt(columns))), ExitStack() as stack:
                if self._static is not None:
                    stack.callback(self._static.fill, choice)
                return generate(*args, **kwargs)

    @contextmanager
    def _counted_running(self) -> Iterator[None]:
        call = object()
        self._running.add(call)
        try:
            yield
        finally:
            self._running.discard(call)

    def _expand(self, expand: Callable[..., Any], expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Where `generate` makes several rows of each prompt, the choice gets as many."""
        choice = self.current.get()
        if isinstance(choice, Choice) and choice.prompt is not None and expand_size > 1:
            if self._static is not None:
                self._static.fill(choice, expand_size)
            self.current.set(dataclasses.replace(choice, each=expand_size))
        return expand(expand_size, *args, **kwargs)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        (self._uncompiled.begin if torch.compiler.is_compiling() else self._begin)(args, kwargs)

    def _begin(self, args: Any, kwargs: dict[str, Any]) -> None:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            raise RunError(
                "a trace of the model would keep the choice that it was made with: detach the patches first."
            )
        if "patch" in kwargs:
            raise RunError("`patch=` is for `generate` and `generate_batch`: call the model inside `using`.")
        is_packed = isinstance(self.current.get(), Packed)  # also while a patch is merged, when nothing is chosen
        if type(kwargs.get("cache")).__name__ == "PagedAttentionCache" and not is_packed:
            raise RunError("this manager of continuous batching was made before `attach`: make another one.")
        choice = self._choice()
        if not is_packed:
            self._continuous.check_alone()
        if choice is None:
            return
        if any(kwargs.get(name) is not None for name in ("inputs_embeds", "decoder_inputs_embeds")):
            raise RunError("patches act on token ids: call the model with input_ids, not with inputs_embeds.")
        if self._table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if self._static is None and isinstance(choice, Choice):
                raise RunError("a CUDA graph keeps the choice that it was captured with: attach with max_batch.")
        else:
            self._check_model()
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        is_batch = isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point()
        if self._model.config.is_encoder_decoder:
            is_batch = False  # each side has token ids of its own
        if self._static is not None and is_batch:
            self._static.rows(ids.shape[0])  # compiled code would raise what torch makes of the error
        self.current.set(choice.begin(kwargs, ids if is_batch else None))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        (self._uncompiled.end if torch.compiler.is_compiling() else self._end)(output is not None)

    def _end(self, has_output: bool) -> None:
        choice = self.current.get()
        if choice is None or choice.seen is None:
            return
        self.current.set(dataclasses.replace(choice, seen=None))
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
            here = self._uncompiled.embedding_slots if torch.compiler.is_compiling() else self._embedding_slots
            slots = here(token_ids)
            if slots is None:
                return None
        else:
            if not torch.compiler.is_compiling():
                self._choice()
                self._captured()
            slots = self._static.rows(token_ids.shape[0])
        return self._overlay.embed(slots, token_ids.to(self._table.device), output, scale)

    def _embedding_slots(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        choice = self._choice()
        if choice is None:
            return None
        slots = choice.embedding(token_ids)
        if choice.seen is not None:
            choice.seen.embedding = True
        return slots

    def _on_head(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        hidden = args[0] if args else kwargs["input"]
        if self._static is None:
            here = self._uncompiled.head_slots if torch.compiler.is_compiling() else self._head_slots
            slots, width = here(hidden)
            if slots is None:
                return None
        else:
            width = self.bank.output_width
            if not width:
                return None
            slots = self._static.rows(hidden.shape[0])
        batch, d, V = slots.shape[0], hidden.shape[-1], output.shape[-1]
        # [1, ..., d] for one patch, [B, ..., d] for one each: some heads see more than rows and columns.
        flat = self._overlay.correct(slots, width, hidden.reshape(batch, -1, d), output.reshape(batch, -1, V))
        return flat.view(output.shape)

    def _head_slots(self, hidden: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        choice = self._choice()
        if choice is None or not choice.width:
            return None, 0
        if choice.seen is not None:
            choice.seen.head = True
        return choice.head(hidden), choice.width

    def _captured(self) -> None:
        if self._table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.bank.fix()


def _state(weight: torch.Tensor | None) -> tuple[Any, ...]:
    """What tells that a table is still as it was: where it is, and how often it was written to."""
    if weight is None:
        return ()
    return weight.dtype, weight.device, weight.data_ptr(), None if weight.is_inference() else weight._version


class _Using:
    """A `using` block, which is opened where it is entered, and is no decorator: `bind` is."""

    def __init__(self, open_block: Callable[[FrameType | None], AbstractContextManager[None]]) -> None:
        self._open_block = open_block
        self._block: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if self._block is not None:
            raise RunError("this `using` block is open already: make another one.")
        block = self._open_block(_generator_that_opens(sys._getframe(1)))
        block.__enter__()
        self._block = block

    def __exit__(self, *error: Any) -> None:
        block, self._block = self._block, None
        assert block is not None
        block.__exit__(*error)

    def __call__(self, function: Any) -> Any:
        raise RunError("`using` opens a block: to choose for a function, decorate it with `handle.bind(names)`.")


def _generator_that_opens(frame: FrameType | None) -> FrameType | None:
    """The frame of the generator that opens a `using` block, where it may be left in the middle of it.

    A generator behind `contextmanager`, or a fixture, is left on purpose: its block is its caller's.
    """
    while frame is not None and _package(frame) == "contextlib":  # an ExitStack
        frame = frame.f_back
    opener = frame
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
        while frame is not None and _package(frame) == "torch":  # a generator under `torch.no_grad`
            frame = frame.f_back
        if frame is None or _package(frame) in ("contextlib", "_pytest"):
            return None
    return None if frame is opener else opener


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
