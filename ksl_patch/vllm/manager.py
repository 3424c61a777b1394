"""A worker's adapters: read, checked against the base, put into a slot: a patch, TrainableTokens, a LoRA."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.distributed import get_pp_group
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ksl_patch.bank import SlotRows
from ksl_patch.base import check_base
from ksl_patch.errors import BankError, KslPatchError, PatchError
from ksl_patch.interop import peft
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.store.local import Store
from ksl_patch.vllm.layer import PatchedEmbedding, follow_head, input_embeddings, pack, update_indices
from ksl_patch.vllm.settings import embedding_alone


@dataclass(frozen=True)
class _Read:
    """What a path held: its rows, and for the check against the base the patch, which an adapter of PEFT's is not."""

    path: str
    rows: SlotRows
    patch: Patch | None
    digest: str

    @property
    def nbytes(self) -> int:
        return 2 * self.rows.rows.nbytes


class _Table:
    """This rank's part of the table."""

    def __init__(self, layer: PatchedEmbedding) -> None:
        self.vocab_size, self.hidden_size = layer.base_layer.org_vocab_size, layer.base_layer.embedding_dim
        self.plain, self.rows = layer.plain, layer.base_rows


class _AdapterManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's, which on a rank of a pipeline that has no embedding takes adapters that have nothing for it."""

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if lora_model.loras:
            super()._create_merged_loras_inplace(lora_model)


class PatchManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's manager of a worker's adapters, which reads patches too.

    What was read stays in memory until `drop`: an adapter that vLLM puts aside and takes up again inside a step needs
    no file and no check, and so cannot fail there.

    layer: the embedding that takes patches, None where this rank has none. reason: why patches cannot be served.
    """

    _manager_cls = _AdapterManager
    layer: PatchedEmbedding | None = None
    reason: str | None = None

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """Give the model its adapter layers, the input embedding among them whatever its class calls it."""
        self._kept: dict[int, _Read] = {}
        self._digests: dict[str, str] = {}
        names = input_embeddings(model)
        if len(names) == 1:
            self._want(model, names[0])
        model = super().create_lora_manager(model, vllm_config)
        modules = self._adapter_manager.modules
        if not names:
            if get_pp_group().world_size == 1:
                self.reason = f"{type(model).__name__} has no input embedding that vLLM can wrap."
        elif len(names) > 1:
            self.reason = f"{type(model).__name__} has {len(names)} input embeddings, and a patch is for one."
        elif not isinstance(modules.get(names[0]), PatchedEmbedding):
            self.reason = (
                "this engine has no embedding that takes patches: start vLLM with `--enable-lora`, and with "
                "`--lora-target-modules embed_tokens` among others where it is restricted."
            )
        else:
            self.name, self.layer = names[0], modules[names[0]]
            self.reason = self.layer.reason
            if self.reason is None and not self.layer.looks_up():
                self.reason = f"{type(model).__name__}'s input embedding does more than look a row up and scale it."
            for module in model.modules():
                # DeepSeek's classes for CUDA read the whole table past its layer, in one kernel with the first norm.
                if getattr(module, "replicated_embed", False):
                    module.replicated_embed = False
            follow_head(model, self.layer, last=get_pp_group().is_last_rank)
        if modules and all(isinstance(module, PatchedEmbedding) for module in modules.values()):
            for punica in self._adapter_manager.punica_wrapper_mapping.values():
                update_indices(punica)
        return model

    def _want(self, model: Any, name: str) -> None:
        """Have vLLM wrap the input embedding, for which it asks the class's `embedding_modules`, or the targets."""
        own = name.rpartition(".")[2]
        modules = {**model.embedding_modules, own: "input_embeddings"}
        model.embedding_modules = self.embedding_modules = modules
        targets = self.lora_config.target_modules
        if targets is not None and "embed_tokens" in targets:
            self.lora_config.ksl_patch_alone = embedding_alone(self.lora_config)  # for what is loaded after it
            self.lora_config.target_modules = [name if target == "embed_tokens" else target for target in targets]

    def add(self, request: LoRARequest) -> int | None:
        """Read what a request names, check it against the base as it is now, keep it, and load it.

        Returns the bytes that are kept, or None for what is not ours to keep. Raises ValueError, one sentence, for
        what cannot be served exactly, and whatever vLLM's own loader raises.
        """
        size = self._read(request)
        self.add_adapter(request)
        return size

    def _read(self, request: LoRARequest) -> int | None:
        number, path = request.lora_int_id, request.lora_path
        try:
            read, kept = self._open(request), self._kept.get(number)
            if read is None and kept is not None and kept.path == path and not Path(path).exists():
                read = kept
            if read is None:
                return None
            # vLLM's prefix cache knows an adapter by its name and path alone.
            if self._digests.setdefault(path, read.digest) != read.digest:
                raise PatchError(f"{path} has another content than it had: give the new one a path of its own.")
            other = getattr(self._adapter_manager.get_adapter(number), "ksl_patch_path", path)
            if other != path:
                raise BankError(two_contents(request, other))
            self._check(read)
        except KslPatchError as error:
            raise ValueError(f"{request.lora_name}: {error}") from error
        self._kept[number] = read
        return read.nbytes

    def drop(self, numbers: list[int]) -> None:
        """Forget what was read of these ids; what is loaded of them stays so."""
        for number in numbers:
            self._kept.pop(number, None)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter into a slot, or take the slot that it has. vLLM calls it for a batch's adapters, each step.

        Raises ValueError for two contents of one id, which vLLM trusts to be unique.
        """
        if self._cached_dummy_lora is not False:  # a warm-up, whose ids may be somebody's
            added: bool = super().add_adapter(lora_request)
            return added
        number, path, manager = lora_request.lora_int_id, lora_request.lora_path, self._adapter_manager
        loaded = manager.get_adapter(number)
        if loaded is not None:
            known = getattr(loaded, "ksl_patch_path", None)
            if known is None:  # what a warm-up left
                manager.remove_adapter(number)
            elif lora_request.load_inplace:
                if Path(path).is_file() or Path(known).is_file():
                    raise ValueError(
                        "a patch is not changed in place, where requests in flight would see it: replace it."
                    )
            elif known != path and (Path(path).is_file() or Path(known).is_file()):
                raise ValueError(two_contents(lora_request, known))
            else:  # vLLM changes ordinary adapters in place, and knows them by id
                manager.activate_adapter(number)
                return True
        added = super().add_adapter(lora_request)
        return added

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """An adapter as vLLM wants it. Raises ValueError, one sentence, for what cannot be served exactly."""
        number = lora_request.lora_int_id
        try:
            kept = self._kept.get(number)
            if (kept is None or kept.path != lora_request.lora_path) and self._read(lora_request) is not None:
                kept = self._kept[number]
            if kept is not None and kept.path == lora_request.lora_path:
                lora = LoRAModel(number, 1, {} if self.layer is None else {self.name: _weights(self.name, kept.rows)})
            else:
                lora = self._load_other(lora_request)
        except KslPatchError as error:
            raise ValueError(f"{lora_request.lora_name}: {error}") from error
        lora.ksl_patch_path = lora_request.lora_path
        return lora

    def _load_other(self, request: LoRARequest) -> LoRAModel:
        """A LoRA with or without trained tokens, and one that has the embedding among its targets."""
        path = Path(get_adapter_absolute_path(request.lora_path))
        if peft.trains_tokens(path):
            with tempfile.TemporaryDirectory() as folder:
                peft.split_lora(path, Path(folder))
                lora = super()._load_adapter(msgspec.structs.replace(request, lora_path=folder))
            read = self._peft_rows(request.lora_path, path)
            self._check(read)
            if self.layer is not None:
                lora.loras[self.name] = _weights(self.name, read.rows)
            return lora
        lora = super()._load_adapter(request)
        manager = self._adapter_manager
        for name, layer in manager.modules.items():
            # vLLM finds it by shorter names too, where a class is served as another task's.
            found = manager._get_lora_layer_weights(lora, name) if isinstance(layer, PatchedEmbedding) else None
            if found is not None:
                lora.loras = {key: value for key, value in lora.loras.items() if value is not found}
                lora.loras[name] = _weights(name, _as_rows(layer, found))
        return lora

    def _open(self, request: LoRARequest) -> _Read | None:
        """What a path holds if that is rows alone."""
        path = Path(get_adapter_absolute_path(request.lora_path))
        if path.is_file():
            patch = Patch.load(path)
            store = Store()
            if path.is_relative_to(store.root.resolve()):
                store.hold()  # other processes of this engine read it too
            return _Read(request.lora_path, slot_rows(patch), patch, patch.digest)
        if not peft.trains_tokens(path) or peft.read_config(path).get("peft_type") == "LORA":
            return None
        return self._peft_rows(request.lora_path, path)

    def _peft_rows(self, given: str, path: Path) -> _Read:
        self._raise_reason()
        config = self._adapter_manager.model.config
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        name = "embed_tokens" if self.layer is None else self.name.rpartition(".")[2]
        rows = peft.read_trainable_tokens(path, embedding=name, tied=tied)
        content = hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in pack(rows)))
        return _Read(given, rows, None, content.hexdigest())

    def _raise_reason(self) -> None:
        if self.reason is not None:
            raise BankError(self.reason)

    def _check(self, read: _Read) -> None:
        """Raise KslPatchError for what this rank cannot serve, or what was made for another base."""
        self._raise_reason()
        patch, layer = read.patch, self.layer
        if patch is not None and patch.meta.scope == "prompt":
            raise PatchError(
                "the patch acts on the prompt only, and vLLM does not say which of the tokens that it computes again "
                "after a preemption were the prompt's: serve it with `ksl_patch.attach`."
            )
        if layer is None:
            if read.rows.output and get_pp_group().is_last_rank:
                raise BankError("the last rank of this pipeline has the head and no embedding, as side input+output.")
            return
        layer.bank.check(read.rows)
        if read.rows.output and layer.head_reason is not None:
            raise BankError(layer.head_reason)
        if patch is not None:
            mine = layer.on_this_rank(patch.token_ids)
            check_base(patch.meta.base, patch.token_ids[mine], patch.base_rows[mine], _Table(layer))


def two_contents(request: LoRARequest, other: str) -> str:
    """The sentence for a request whose id has another path."""
    return f"{request.lora_path} and {other} were given one adapter id, {request.lora_int_id}."


def _weights(name: str, rows: SlotRows) -> LoRALayerWeights:
    ids, values = pack(rows)
    return LoRALayerWeights(name, 1, 1, ids, values, scaling=1)


def _as_rows(layer: PatchedEmbedding, lora: LoRALayerWeights) -> SlotRows:
    """A LoRA of the embedding, which changes the rows of those tokens alone that A has values for."""
    token_ids = lora.lora_a.ne(0).any(dim=0).nonzero()[:, 0]
    if not len(token_ids):
        token_ids = torch.zeros(1, dtype=torch.int64)
    if len(token_ids) > layer.bank.max_rows:
        raise BankError(
            f"the adapter changes {len(token_ids)} rows of the embedding, and a slot has room for "
            f"{layer.bank.max_rows}: reserve more with max_rows, or leave the embedding out of the adapter."
        )
    base = layer.unscaled(token_ids.to(layer.bank.tensors.rows.device)).cpu()
    change = lora.scaling * (lora.lora_a[:, token_ids].T.float() @ lora.lora_b.T.float())
    rows = SlotRows(token_ids, (base.float() + change).to(base.dtype))
    layer.bank.check(rows)
    return rows
