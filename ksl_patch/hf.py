"""Patches on transformers models: serving them by name, loading a base, and generating."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ksl_patch.bank import PatchBank, SlotRows
from ksl_patch.base import find_embedding, tokenizer_digest
from ksl_patch.continuous import ContinuousBatching
from ksl_patch.errors import RunError
from ksl_patch.overlay import Overlay
from ksl_patch.patch import Patch, PatchMeta, check_name
from ksl_patch.store.hub import PREFIX
from ksl_patch.store.local import load


@dataclass(frozen=True)
class _Choice:
    """Which slot each row of a batch uses.

    slots: int64 [N], one entry for each row, or [1] for all of them. after: the slots behind the prompt, where some
    patch has scope "prompt". columns, before: columns of the prompt and those of earlier forwards, inside `generate`
    alone, which may repeat rows. positions: int64 [1, T] for a packed batch, of which the head
    sees those at `kept`. taken: the requests that continuous batching has given the entries to, in their order.
    """

    slots: torch.Tensor
    after: torch.Tensor | None = None
    columns: int | None = None
    before: Any = 0
    positions: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    taken: list[str] = dataclasses.field(default_factory=list)

    def rows(self, slots: torch.Tensor, batch: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1] or [1, 1]."""
        if len(slots) > 1:
            repeats, left = divmod(batch, len(slots))
            if left or repeats < 1 or (repeats > 1 and self.columns is None):
                raise RunError(f"{len(slots)} patches were chosen for a batch of {batch}: give one entry for each row.")
            slots = slots.repeat_interleave(repeats)  # beams and return sequences of one prompt stay together
        return slots[:, None]

    def embedding(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the embedding sees, broadcastable to [B, T]."""
        if self.positions is not None:
            return self.positions
        slots = self.rows(self.slots, batch)
        if self.after is None or self.columns is None:
            return slots
        column = self.before + torch.arange(length, device=slots.device)
        return torch.where(column < self.columns, slots, self.rows(self.after, batch))

    def head(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each position that the head sees."""
        if self.positions is None:
            return self.rows(self.slots, batch)
        return self.positions if length == self.positions.shape[1] else self.positions[:, self.kept]


@dataclass(frozen=True)
class _StaticChoice:
    """The same from one device buffer [max_batch], which compiled code and CUDA graphs read."""

    slots: torch.Tensor

    def embedding(self, batch: int, length: int) -> torch.Tensor:
        """The slot of each batch row, [B, 1]."""
        if batch > len(self.slots):
            raise RunError(f"a batch of {batch} rows is more than the max_batch={len(self.slots)} of `attach`.")
        return self.slots[:batch, None]

    head = embedding


@dataclass(frozen=True)
class _Loaded:
    """What a name stands for."""

    slot: int
    digest: str
    meta: PatchMeta


def attach(
    model: Any,
    *,
    tokenizer: Any = None,
    capacity: int = 0,
    output_width: int = 0,
    budget: int | None = None,
    evict: bool = False,
    max_batch: int | None = None,
) -> PatchHandle:
    """Make a transformers model serve patches by name, another one for every row of a batch.

    tokenizer: given, patches made with another vocabulary are refused too.
    capacity, output_width, budget, evict: of the bank (`PatchBank`).
    max_batch: for torch.compile and CUDA graphs. The choice is then kept in one device buffer of that many rows,
        so that nothing is compiled or captured again, and one `using` block is open at a time. Without it every
        thread has a choice of its own.

    The model's own weights are not touched; PEFT adapters on it keep working. Raises RunError when patches are
    attached already, BaseMismatchError when the model has no embedding to patch.
    """
    bank = {"capacity": capacity, "output_width": output_width, "budget": budget, "evict": evict}
    return PatchHandle(model, tokenizer, max_batch, bank)


class PatchHandle:
    """The patches of one model: load, use, replace, unload, and in the end detach.

    bank: the PatchBank behind it.

    A choice belongs to the thread (and task) that made it: open `using` in the thread that runs the model, not
    around its start. What a `using` block began with stays the same to its end, whatever is replaced or unloaded
    meanwhile.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch: int | None, bank: dict[str, Any]) -> None:
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "ksl_patch" in vars(self._model):
            raise RunError("patches are attached to this model already: use that handle, or detach it first.")
        self._vocabulary = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._table = table = find_embedding(self._model)
        self.bank = PatchBank(table.vocab_size, table.hidden_size, dtype=table.dtype, device=table.device, **bank)
        self._overlay = Overlay(table, self.bank)
        self._lock = threading.RLock()
        self._loaded: dict[str, _Loaded] = {}
        self._open = 0
        self._merged: tuple[str, torch.Tensor, torch.Tensor, Any] | None = None
        self.current: ContextVar[_Choice | None] = ContextVar("ksl_patch_choice", default=None)
        self._static = None
        if max_batch is not None:
            self._static = _StaticChoice(torch.zeros(max_batch, dtype=torch.int64, device=table.device))
        self._hooks = [
            lookup.module.register_forward_hook(functools.partial(self._on_embedding, lookup.scale), with_kwargs=True)
            for lookup in table.lookups
        ]
        self._hooks.append(self._model.register_forward_pre_hook(self._on_forward, with_kwargs=True))
        if table.head is not None and table.tied:
            self._hooks.append(table.head.register_forward_hook(self._on_head))
        vars(self._model)["ksl_patch"] = self
        vars(self._model)["generate"] = functools.wraps(self._model.generate)(
            functools.partial(self._generate, self._model.generate)
        )
        self._continuous = ContinuousBatching(self, self._model)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def names(self) -> list[str]:
        """The names of the loaded patches."""
        return list(self._loaded)

    def digest(self, name: str) -> str:
        """The content that a name stands for now."""
        return self._find(name).digest

    def meta(self, name: str) -> PatchMeta:
        """What a loaded patch says of itself, its template for one."""
        return self._find(name).meta

    def load(self, patch: Patch | str | os.PathLike[str], name: str | None = None) -> str:
        """Load a patch, a patch file or hf://ORG/REPO/FILE under a name (its own by default); returns the name.

        Raises PatchError for a bad file, BaseMismatchError for a patch of another base, BankError when the bank is
        full, RunError for a name that is taken.
        """
        patch = self._read(patch)
        name = check_name(name or patch.meta.name)
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

    def using(self, names: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """A `with` block in which the model answers with patches: one name for all rows, or an entry for each.

        None is the base. A list has one entry for each prompt that `generate` or `generate_batch` gets, or for each
        row of a forward call. Raises RunError for an unknown name, before anything is computed.
        """
        wanted = [names] if names is None or isinstance(names, str) else list(names)
        if not wanted:
            raise RunError("no patch was chosen: give a name, None for the base, or an entry for each row.")
        return self._serving(lambda: [0 if name is None else self._find(name).slot for name in wanted])

    def serving(self, slots: Sequence[int]) -> AbstractContextManager[None]:
        """As `using`, by slots of the bank."""
        return self._serving(lambda: list(slots))

    def merge(self, name: str) -> None:
        """Write a patch into the model's own table: no overlay, no cost, one patch for everybody.

        A tied head that the patch leaves alone gets a table of its own while it lasts. `unmerge` and `detach` undo it
        bit for bit. Raises RunError while a block is open, and for a patch of scope "prompt".
        """
        with self._lock:
            loaded = self._find(name)
            if self._open:
                raise RunError(f"{name} cannot be merged while {self._open} batches are being served.")
            if loaded.meta.scope == "prompt":
                raise RunError(f"{name} acts on the prompt only, so it cannot be written into the table.")
            weight, head = self._table.weight, self._table.head
            with self.bank.hold([loaded.slot]):
                token_ids, rows, output_rows = self.bank.contents(loaded.slot)
            tied: Any = None
            if self._table.tied and output_rows is not rows:
                assert head is not None
                tied, head.weight = head.weight, nn.Parameter(weight.detach().clone(), requires_grad=False)
                if output_rows is not None:
                    head.weight.data[token_ids] = output_rows
            self._merged = (name, token_ids, weight.detach()[token_ids].clone(), tied)
            weight.data[token_ids] = rows

    def unmerge(self) -> None:
        """Give the table its own rows back."""
        with self._lock:
            if self._merged is None:
                raise RunError("no patch is merged.")
            _, token_ids, rows, tied = self._merged
            self._table.weight.data[token_ids] = rows
            if tied is not None:
                assert self._table.head is not None
                self._table.head.weight = tied
            self._merged = None

    def detach(self) -> None:
        """Leave the model as it was, bit for bit. Raises RunError while a block is open; does nothing twice."""
        with self._lock:
            if "ksl_patch" not in vars(self._model):
                return
            if self._open:
                raise RunError(f"cannot detach while {self._open} batches are being served.")
            if self._merged is not None:
                self.unmerge()
            for hook in self._hooks:
                hook.remove()
            self._continuous.remove()
            for name in ("generate", "ksl_patch"):
                del vars(self._model)[name]
            for loaded in self._loaded.values():
                self.bank.remove(loaded.slot)
            self._loaded.clear()

    def opened(self, by: int) -> None:
        """Count the users that the model must not be detached from."""
        with self._lock:
            self._open += by

    def packed(self, positions: torch.Tensor, kept: torch.Tensor) -> AbstractContextManager[None]:
        """A `with` block for a packed batch: the slot of each position, int64 [1, T]; the head sees `kept` of them."""
        return self._chosen(_Choice(positions[0, :1], positions=positions, kept=kept))

    def restarted(self) -> AbstractContextManager[None]:
        """A `with` block in which the entries of the open choice are given out to requests from the first on."""
        choice = self.current.get()
        return self._chosen(None if choice is None else dataclasses.replace(choice, taken=[]))

    @property
    def is_static(self) -> bool:
        """Whether the choice is kept in one device buffer (`max_batch`)."""
        return self._static is not None

    @contextmanager
    def _chosen(self, choice: _Choice | None) -> Iterator[None]:
        token = self.current.set(choice)
        try:
            yield
        finally:
            self.current.reset(token)

    @contextmanager
    def _serving(self, resolve: Callable[[], list[int]]) -> Iterator[None]:
        with ExitStack() as stack:
            with self._lock:
                self._attached()
                if self._merged is not None:
                    raise RunError(f"{self._merged[0]} is merged into the model: unmerge it before choosing patches.")
                if self._static is not None and self._open:
                    raise RunError("a handle with max_batch serves one batch at a time: another block is open.")
                slots = resolve()
                stack.enter_context(self.bank.hold(slots))
                self.opened(1)
                stack.callback(self.opened, -1)
            if self._static is not None:
                if len(slots) > len(self._static.slots):
                    raise RunError(f"{len(slots)} entries are more than the max_batch of this handle.")
                stack.callback(self._static.slots.zero_)
                self._fill(slots)
            stack.enter_context(self._chosen(self._choice(slots)))
            yield

    def _choice(self, slots: list[int]) -> _Choice:
        device = self._table.device
        after = None
        if any(map(self.bank.is_prompt_only, slots)):
            after = torch.tensor([0 if self.bank.is_prompt_only(slot) else slot for slot in slots], device=device)
        return _Choice(torch.tensor(slots, device=device), after)

    def _fill(self, slots: Sequence[int]) -> None:
        assert self._static is not None
        values = torch.tensor(slots, device=self._table.device)
        if len(slots) == 1:
            self._static.slots.copy_(values.expand_as(self._static.slots))
        else:
            self._static.slots[: len(slots)] = values

    def _find(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            raise RunError(f"no patch named {name!r} is loaded; loaded are: {', '.join(self._loaded) or 'none'}.")
        return loaded

    def _attached(self) -> None:
        if vars(self._model).get("ksl_patch") is not self:
            raise RunError("the handle is detached from its model: attach again.")

    def _read(self, patch: Patch | str | os.PathLike[str]) -> Patch:
        if isinstance(patch, str) and patch.startswith(PREFIX):
            patch = load(patch)
        patch = patch if isinstance(patch, Patch) else Patch.load(patch)
        if self._merged is not None:
            raise RunError(f"{self._merged[0]} is merged into the model's table: unmerge it before loading others.")
        patch.check_table(self._table, self._vocabulary)
        if patch.meta.scope == "prompt" and (self._static is not None or self._model.config.is_encoder_decoder):
            where = "with max_batch" if self._static is not None else "on an encoder-decoder"
            raise RunError(f"{patch.meta.name} has scope 'prompt', which is not served {where}.")
        return patch

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        choice = self.current.get()
        if choice is None:
            return generate(*args, **kwargs)
        given = next(
            (kwargs[k] for k in ("inputs", "input_ids") if kwargs.get(k) is not None), args[0] if args else None
        )
        if given is None or kwargs.get("inputs_embeds") is not None:
            raise RunError("patches act on token ids: call generate with input_ids, not with inputs_embeds.")
        batch, columns = given.shape[0], given.shape[1]
        if len(choice.slots) not in (1, batch):
            raise RunError(f"{len(choice.slots)} patches were chosen for {batch} prompts: give one entry for each.")
        if self._static is not None and len(choice.slots) > 1:
            config = kwargs.get("generation_config") or self._model.generation_config
            each = max(
                kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
            )
            self._fill(choice.slots.repeat_interleave(each).tolist()[: len(self._static.slots)])
        with self._chosen(dataclasses.replace(choice, columns=columns)):
            return generate(*args, **kwargs)

    def _on_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._static is not None:
            return
        choice = self.current.get()
        if choice is not None and choice.after is not None:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the newer and the older name
            before = 0 if cache is None else cache.get_seq_length()
            self.current.set(dataclasses.replace(choice, before=before))

    def _on_embedding(
        self, scale: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor
    ) -> Any:
        choice = self.current.get() if self._static is None else self._static
        if choice is None:
            return None
        token_ids = args[0] if args else kwargs["input"]
        batch, length = token_ids.shape
        return self._overlay.embed(choice.embedding(batch, length), token_ids.to(output.device), output, scale)

    def _on_head(self, module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        choice = self.current.get() if self._static is None else self._static
        if choice is None or not self.bank.output_width:
            return None
        batch, length = args[0].shape[:2]
        return self._overlay.correct(choice.head(batch, length), args[0], output)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. stopped: it ended by itself with an end-of-sequence token, the last one."""

    text: str
    stopped: bool
    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens it wrote."""
        return len(self.token_ids)


def load_base(
    base: str, *, revision: str | None = None, dtype: torch.dtype | str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder or the Hub, in evaluation mode.

    dtype: "auto" keeps the checkpoint's. device: "cuda" when there is one, else "cpu", by default.
    Never runs code from the repository. Raises RunError with one sentence.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if os.path.sep in base and not os.path.isdir(base) and not _looks_like_hub_id(base):  # noqa: PTH112
            raise RunError(f"cannot load the base: there is no folder {base}.") from error
        reason = str(error).strip().splitlines()
        raise RunError(f"cannot load the base {base}: {reason[0] if reason else type(error).__name__}") from error
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def slot_rows(patch: Patch) -> SlotRows:
    """A patch in the overlay's terms."""
    meta = patch.meta
    return SlotRows(patch.token_ids, patch.rows, meta.side == "input+output", patch.output_rows, meta.scope == "prompt")


def prompt_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Token ids of prompts. chat: the text carries its own special tokens and none are added."""
    return [tokenizer(prompt, add_special_tokens=not chat).input_ids for prompt in prompts]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end a generation: the model's own and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or [])
    ids = sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    if not ids:
        raise RunError("the tokenizer has no end-of-sequence token, so nothing would end a generation.")
    return ids


def end_token_id(model: Any, tokenizer: Any) -> int:
    """The token id that ends an answer in training: the tokenizer's own, or the first of `end_token_ids`."""
    ids = end_token_ids(model, tokenizer)
    return ids[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    patches: Sequence[Patch | None],
    *,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
) -> list[Completion]:
    """Greedy completions of prompts (token ids), one patch or None (the base) for each, in mixed batches.

    Every patch must have passed `patch.check(model)`. A patch of scope "prompt" acts on the prompt only.
    """
    distinct = list({id(patch): patch for patch in patches if patch is not None}.values())
    with attach(model) as handle:
        slot_of = {id(patch): handle.bank.add(slot_rows(patch)) for patch in distinct}
        slots = [slot_of.get(id(patch), 0) for patch in patches]
        return complete(model, tokenizer, prompts, slots, handle, max_new_tokens, batch_size)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    slots: list[int],
    handle: PatchHandle,
    max_new_tokens: int,
    batch_size: int | None,
) -> list[Completion]:
    """Greedy completions of prompts on a model with patches attached, the bank's slot for each."""
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    size = batch_size or len(prompts) or 1
    # Prompts of like length together: less padding. The results go back in the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        with handle.serving([slots[i] for i in part]):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        for i, new in zip(part, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True)
            written = tuple(new if end is None else new[: end + 1])
            completions[i] = Completion(text=text, stopped=end is not None, token_ids=written)
    return [completions[i] for i in range(len(prompts))]


def _looks_like_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "/", "~"))
