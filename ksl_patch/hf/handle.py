"""The handle: patches on a transformers model, loaded, chosen, replaced and unloaded by name.

A request that was given a patch is answered with it or raises. So whatever cannot be followed is refused: a choice
outside its block, a forward past the patched embedding, a model that was changed after `attach`. What loads a patch
from a name or a path comes from outside (attach.py).
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ksl_patch.bank import PatchBank
from ksl_patch.base.identity import check_head
from ksl_patch.base.model_digests import tokenizer_digest, weights_digest
from ksl_patch.errors import RunError
from ksl_patch.hf.binding import F, bind
from ksl_patch.hf.blocks import Blocks, Loaded, Names
from ksl_patch.hf.continuous import ContinuousBatching
from ksl_patch.hf.hooks import Hooks
from ksl_patch.hf.patched_model import PatchedModel
from ksl_patch.hf.wiring import Wiring
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch, PatchMeta
from ksl_patch.patch.names import check_name

Reference = str | os.PathLike[str]


class _Unset:
    """No choice, where None is the base."""


_UNSET = _Unset()


class PatchHandle:
    """The patches of one model: load, use, replace, unload, and in the end detach.

    bank: the PatchBank behind it.

    A choice belongs to the thread (and task) that made it. `bind` hands one over to another thread, or to a generator
    whose steps others run. What a block began with stays the same to its end, whatever is replaced or unloaded
    meanwhile.
    """

    def __init__(
        self,
        model: Any,
        *,
        resolve: Callable[[Reference], tuple[Patch, str | None]],
        tokenizer: Any,
        max_batch: int | None,
        strict: bool,
        bank: dict[str, Any],
    ) -> None:
        """Attach, as `attach` says. resolve: the patch of a reference, and what the store calls it."""
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
            raise RunError(f"patches are attached to a model of transformers, and this is a {type(model).__name__}.")
        base: Any = model
        own = base.get_base_model() if hasattr(base, "get_base_model") else base
        if "ksl_patch" in vars(own):
            raise RunError("patches are attached to this model already: use that handle, or detach it first.")
        self._resolve, self._tokenizer = resolve, tokenizer
        self._vocabulary = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._weights = functools.cache(functools.partial(weights_digest, model))  # read with the first patch
        self._patched = PatchedModel(own)
        table = self._patched.table
        if any("ksl_patch" in vars(lookup.module) for lookup in table.lookups):
            raise RunError("patches are attached to a part of this model, or to what it is a part of, already.")
        self.bank = PatchBank(table.vocab_size, table.hidden_size, dtype=table.dtype, device=table.device, **bank)
        self._blocks = Blocks(self._patched, self.bank, max_batch=max_batch, strict=strict)
        self._wiring = Wiring(own)
        with self._wiring.undone_on_error() as wiring:
            self._continuous = ContinuousBatching(self._blocks, self._patched, self.bank)
            Hooks(self._patched, self._blocks, self.bank, self._continuous.check_alone).wire(wiring)
            for each in {id(each): each for each in (*(lookup.module for lookup in table.lookups), own)}.values():
                wiring.set(each, "ksl_patch", self)
            self._continuous.wire(wiring)
            for lookup in table.lookups:
                wiring.own_class(lookup.module)
            if table.head is not None:
                wiring.own_class(table.head)
            wiring.copy_without()
        self._patched.is_attached = True

    def __repr__(self) -> str:
        loaded = (
            ", ".join(f"{name} {each.digest[:12]}" for name, each in list(self._blocks.loaded.items())) or "no patches"
        )
        state = "" if self.is_attached else ", detached"
        return f"<PatchHandle of {type(self._patched.model).__name__}{state}: {loaded}>"

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def is_attached(self) -> bool:
        """Whether the model still serves this handle's patches."""
        return self._patched.is_attached

    @property
    def names(self) -> list[str]:
        """The names of the loaded patches."""
        return list(self._blocks.loaded)

    @property
    def merged(self) -> str | None:
        """The name of the patch that is written into the model's table."""
        merged = self._patched.merged
        return None if merged is None else merged.name

    def digest(self, name: str) -> str:
        """The content that a name stands for now."""
        return self._blocks.find(name).digest

    def meta(self, name: str) -> PatchMeta:
        """What a loaded patch says of itself, its template for one."""
        return self._blocks.find(name).meta

    def load(self, patch: Patch | Reference, name: str | None = None) -> str:
        """Load a patch under a name, by default the store's where it was named so, else its own; returns the name.

        patch: one, or what the command line takes for one: a path, a name or digest of the local store, or
        hf://ORG/REPO/FILE.

        Raises PatchError for a bad file, BaseMismatchError for a patch of another base, BankError when the bank is
        full, RunError for a name that is taken.
        """
        patch, stored = self._read(patch)
        name = check_name(name or stored or patch.meta.name)
        with self._blocks.lock:
            self._patched.check_attached()
            if name in self._blocks.loaded:
                raise RunError(f"a patch named {name} is loaded already: replace it, or choose another name.")
            self._blocks.loaded[name] = Loaded(self.bank.add(slot_rows(patch)), patch.digest, patch.meta)
        return name

    def replace(self, name: str, patch: Patch | Reference) -> None:
        """Put another patch behind a name. Blocks that are open keep the old one; new ones get the new one."""
        patch, _ = self._read(patch)
        with self._blocks.lock:
            old = self._blocks.find(name)
            self._blocks.loaded[name] = Loaded(self.bank.replace(old.slot, slot_rows(patch)), patch.digest, patch.meta)

    def unload(self, name: str) -> None:
        """Forget a name. Its rows leave the bank when the last block that uses them ends."""
        with self._blocks.lock:
            self.bank.remove(self._blocks.find(name).slot)
            del self._blocks.loaded[name]

    def using(
        self, names: Names | _Unset = _UNSET, *, languages: Names | _Unset = _UNSET
    ) -> AbstractContextManager[None]:
        """A `with` block in which the model answers with patches: one name for all rows, or an entry for each.

        None is the base. A list has one entry for each prompt that `generate` or `generate_batch` gets, or for each
        row of a forward call. The block is this thread's, or this task's: see `bind` for others. Raises RunError for
        an unknown name, before anything is computed, and in whatever still runs when the block has ended.
        languages: BCP 47 tags in place of names, of which each has a patch, as `for_language` finds it.
        """
        if not isinstance(names, _Unset) and isinstance(languages, _Unset):
            return self._blocks.using(names)
        if isinstance(names, _Unset) and not isinstance(languages, _Unset):
            return self._blocks.using(self._names_for(languages))
        raise RunError("a choice is of names or of languages: give one of the two.")

    def for_language(self, language: str) -> str | None:
        """The name of the loaded patch that speaks a language, a BCP 47 tag; None where there is none.

        The nearest in script and region: "pt-BR" gets a patch of "pt" or of "pt-PT", and none of another script or
        language. Of equally near ones it is the one that was loaded first. Raises DataError for what is no such tag.
        """
        from ksl_patch.patch.by_language import ByLanguage, check_tag

        with self._blocks.lock:
            languages = {name: each.meta.language for name, each in self._blocks.loaded.items()}
        return ByLanguage(languages).choose([check_tag(language)]).name

    def _names_for(self, languages: Names) -> Names:
        def name(language: str | None) -> str | None:
            if language is None:
                return None
            if found := self.for_language(language):
                return found
            from ksl_patch.patch.by_language import spoken

            known = spoken(each.meta.language for each in list(self._blocks.loaded.values()))
            raise RunError(f"no loaded patch speaks {language!r}; they speak {known}.")

        return (
            name(languages) if languages is None or isinstance(languages, str) else [name(each) for each in languages]
        )

    def serving(self, slots: int | Sequence[int]) -> AbstractContextManager[None]:
        """As `using`, by slots of the bank."""
        return self._blocks.serving(slots)

    def bind(self, names: Names) -> Callable[[F], F]:
        """Hand a choice over: `bind("es")(function)` runs with it in whatever thread, task or context it is called.

        So `Thread(target=handle.bind("es")(model.generate), kwargs=...)` answers in Spanish, and so does every step of
        a generator, iterator or coroutine that the function returns. Each call is a block of its own, and so is what
        it returns to be run later. A name is looked up anew in each call. Also a decorator. Raises RunError for an
        unknown name, at once and when a call begins.
        """
        return bind(self._blocks, names)

    def marking(self, mask: torch.Tensor) -> AbstractContextManager[None]:
        """A `with` block that says which positions of forward passes are the prompt's, for patches of scope "prompt".

        mask: bool [B, T], True where the prompt is, for forward passes of that shape. `generate` needs none. Raises
        RunError outside `using`.
        """
        return self._blocks.marking(mask)

    def merge(self, name: str) -> None:
        """Write a patch into the model's own table: no overlay, no cost, one patch for everybody.

        A tied head that the patch leaves alone gets a table of its own while it lasts. `unmerge` and `detach` undo it
        bit for bit. Raises RunError while anything is served, while another patch is merged, and for a patch of
        scope "prompt".
        """
        with self._blocks.lock:
            loaded = self._blocks.find(name)
            self._check_nothing_runs(f"{name} cannot be merged")
            if self._patched.merged is not None:
                raise RunError(f"{self._patched.merged.name} is merged into the model: unmerge it first.")
            if loaded.meta.scope == "prompt":
                raise RunError(f"{name} acts on the prompt only, so it cannot be written into the table.")
            self._patched.check_unchanged()
            with self.bank.hold([loaded.slot]):
                self._patched.merge(name, *self.bank.contents(loaded.slot))

    def unmerge(self) -> None:
        """Give the table its own rows back. Raises RunError when nothing is merged, or while anything is served."""
        with self._blocks.lock:
            if self._patched.merged is None:
                raise RunError("no patch is merged.")
            self._check_nothing_runs(f"{self._patched.merged.name} cannot be taken out")
            self._patched.unmerge()

    def detach(self) -> None:
        """Leave the model as it was, bit for bit. Raises RunError while anything is served; does nothing twice."""
        blocks = self._blocks
        with blocks.lock:
            if not self.is_attached:
                return
            if blocks.open or blocks.requests:
                gc.collect()  # what nobody has any more
            self._check_nothing_runs("cannot detach")
            self._continuous.close()
            if self._patched.merged is not None:
                self.unmerge()
            self._patched.is_attached = False
            self._wiring.undo()
            for loaded in blocks.loaded.values():
                self.bank.remove(loaded.slot)
            blocks.loaded.clear()

    def _check_nothing_runs(self, what: str) -> None:
        self._blocks.check_nothing_runs(what, managers=self._continuous.is_running)

    def _read(self, patch: Patch | Reference) -> tuple[Patch, str | None]:
        patch, stored = (patch, None) if isinstance(patch, Patch) else self._resolve(patch)
        merged, model, table = self._patched.merged, self._patched.model, self._patched.table
        if merged is not None:
            raise RunError(f"{merged.name} is merged into the model's table: unmerge it before loading others.")
        self._patched.check_unchanged()
        patch.check_table(table)
        if self._tokenizer is not None:
            patch.check_vocabulary(self._tokenizer, self._vocabulary, stacklevel=4)
        patch.check_body(model, self._weights, stacklevel=4)
        if patch.meta.side == "input+output":
            check_head(patch.meta.base, patch.token_ids, patch.base_rows, table)
        if patch.meta.scope == "prompt" and (self._blocks.static is not None or model.config.is_encoder_decoder):
            where = "with max_batch" if self._blocks.static is not None else "on an encoder-decoder"
            raise RunError(f"{patch.meta.name} has scope 'prompt', which is not served {where}.")
        return patch, stored
