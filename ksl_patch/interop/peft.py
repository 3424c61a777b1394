"""PEFT's adapters: TrainableTokens, alone or inside a LoRA, to patches and back; patches to LoRA of the embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ksl_patch.bank import SlotRows
from ksl_patch.base import find_embedding
from ksl_patch.errors import BaseMismatchError, PatchError
from ksl_patch.patch import Patch, Side, TemplateMeta
from ksl_patch.patch.meta import timestamp

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_DELTA = ".trainable_tokens_delta"
_HEAD = "lm_head"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM


@dataclass(frozen=True)
class ModuleNames:
    """Where a model has its embedding and its head, such as "model.embed_tokens" and "lm_head"."""

    embedding: str
    head: str | None


def module_names(model: Any) -> ModuleNames:
    """The names in a model. Raises PatchError."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names:
        raise PatchError(f"{type(model).__name__} has no input embedding of its own.")
    return ModuleNames(names[id(embedding)], names.get(id(head)))


def names_tokens(config: dict[str, Any]) -> bool:
    """Whether an adapter's config names tokens that were trained."""
    return config.get("peft_type") == "TRAINABLE_TOKENS" or bool(config.get("trainable_token_indices"))


def trains_tokens(path: Path) -> bool:
    """Whether a path is an adapter's folder that holds trained tokens. Raises PatchError as `read_config`."""
    return (path / CONFIG).is_file() and names_tokens(read_config(path))


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's config. Raises PatchError."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PatchError(f"cannot read {folder / CONFIG}: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(config, dict):
        raise PatchError(f"{folder / CONFIG} is not an adapter's config: it holds no JSON object.")
    return config


def read_trainable_tokens(folder: Path, *, tied: bool, embedding: str | None = None) -> SlotRows:
    """The tokens that an adapter replaces and their rows, which PEFT stores as absolute values.

    embedding: the name of the model's input embedding in its parent, such as "embed_tokens", where it is known:
    others, as that of positions, hold no tokens. tied: whether the model's head shares the embedding's table; PEFT
    then changes the head's rows as well.
    Raises PatchError when the adapter holds something else, or tunes different tokens in the embedding and the head.
    """
    config, tensors = read_config(folder), _read_deltas(folder)
    if embedding is None:
        embedding = next((name for key in tensors if (name := _module(key)) != _HEAD), "")
    rows = {name: tensor for key, tensor in tensors.items() if (name := _module(key)) in (embedding, _HEAD)}
    if embedding not in rows or len(rows) < len(tensors):
        raise PatchError(
            f"{folder} has trained tokens in {sorted(tensors)}, where those of the input embedding {embedding} are "
            "needed, and of the head at most."
        )
    alone = config.get("peft_type") == "TRAINABLE_TOKENS"
    indices = config.get("token_indices" if alone else "trainable_token_indices")
    by_module = indices if isinstance(indices, dict) else {}
    of = {name.split(".")[-1]: found for name, found in by_module.items()}
    head_indices, own_indices = of.get(_HEAD), of.get(embedding, indices)
    if head_indices is not None and head_indices != own_indices:
        raise PatchError(f"{folder} tunes different tokens in the embedding and the head, which a patch cannot hold.")
    ids = own_indices if isinstance(own_indices, list) else []
    if not ids or not all(isinstance(index, int) and 0 <= index < 2**31 for index in ids):
        raise PatchError(f"{folder / CONFIG} names no token ids.")
    for tensor in rows.values():
        if tensor.ndim != 2 or len(tensor) != len(ids) or not tensor.is_floating_point():
            raise PatchError(f"{folder} has rows of shape {list(tensor.shape)} for {len(ids)} token ids.")
        if not tensor.isfinite().all():
            raise PatchError(f"{folder} has a NaN or an infinity in its rows.")
    own, head = rows[embedding], rows.get(_HEAD)
    if tied and (head is None or torch.equal(own, head)):
        return SlotRows(torch.tensor(ids), own, output=True)
    return SlotRows(torch.tensor(ids), own, output=head is not None, output_rows=head)


def _module(key: str) -> str:
    """The name of the module in its parent that a tensor belongs to."""
    path = key.removesuffix(_DELTA).split(".")
    return path[-2] if path[-1] == "token_adapter" else path[-1]


def import_adapter(
    folder: Path,
    model: Any,
    *,
    name: str,
    tokenizer: Any = None,
    language: str | None = None,
    template: TemplateMeta | None = None,
    licence: str | None = None,
) -> tuple[Patch, bool]:
    """The trained tokens of an adapter as a patch, and whether the adapter has more, which is left out.

    model: the base. template: the prompt that it was trained with. The rows are rounded to the base's dtype, as PEFT
    does when it puts them into the table.
    Raises PatchError, BaseMismatchError.
    """
    table = find_embedding(model)
    V, d = table.vocab_size, table.hidden_size
    embedding = module_names(model).embedding.rpartition(".")[2]
    rows = read_trainable_tokens(folder, embedding=embedding, tied=table.tied)
    if rows.output and not table.tied:
        raise PatchError(f"{folder} changes the head of a base whose head is not tied, which a patch cannot.")
    config = read_config(folder)
    if rows.rows.shape[1] != d or int(rows.token_ids.max()) >= V:
        raise BaseMismatchError(
            f"{folder} has rows of {rows.rows.shape[1]} values for tokens up to {int(rows.token_ids.max())}, and this "
            f"base's table has {V} rows of {d}: it was trained on another base (its config names "
            f"{config.get('base_model_name_or_path') or 'none'})."
        )
    more = config.get("peft_type") != "TRAINABLE_TOKENS"
    side: Side = "input+output" if rows.output else "input"
    patch = Patch.from_model(
        model, rows.token_ids, rows.rows, name=name, language=language, tokenizer=tokenizer, side=side,
        output_rows=rows.output_rows, template=template, licence=licence, created=timestamp(),
    )  # fmt: skip
    return patch, more


def export_trainable_tokens(patch: Patch, folder: Path, names: ModuleNames) -> None:
    """Write a patch as a TrainableTokens adapter, which PEFT loads with the same result.

    PEFT changes a tied head with the embedding, so a patch of side "input" of a tied base is refused, as are head's
    rows of their own and scope "prompt". Raises PatchError.
    """
    from peft import TrainableTokensConfig

    _exportable(patch)
    tied, output = patch.meta.base.tied, patch.meta.side == "input+output"
    if tied and not output:
        raise PatchError("PEFT's TrainableTokens would change the tied head too: export the patch with --format lora.")
    if patch.output_rows is not None:
        raise PatchError("the patch has rows of their own for the head, which TrainableTokens cannot hold.")
    target = names.embedding.rpartition(".")[2]
    config = TrainableTokensConfig(
        token_indices=patch.token_ids.tolist(), target_modules=[target], task_type="CAUSAL_LM",
        base_model_name_or_path=patch.meta.base.model_id, inference_mode=True,
    )  # fmt: skip
    modules = [names.embedding, *([names.head] if output and names.head else [])]
    tensors = {f"base_model.model.{module}{_DELTA}": patch.rows.clone() for module in modules}
    _write(config, tensors, folder)


def lora_bytes(patch: Patch) -> int:
    """How large the tensors of `export_lora` are. Raises PatchError as that does."""
    base = patch.meta.base
    _check_lora(patch)
    return 4 * _rank(patch) * (base.vocab_size + base.hidden_size)


def _check_lora(patch: Patch) -> None:
    _exportable(patch)
    if patch.meta.side != "input":
        raise PatchError("the patch changes the head too, which a LoRA of the embedding cannot: see TrainableTokens.")


def _rank(patch: Patch) -> int:
    k = len(patch.token_ids)
    rank = next((rank for rank in _RANKS if rank >= k), None)
    if rank is None:
        raise PatchError(f"the patch has {k} rows, and vLLM's LoRA at most {_RANKS[-1]}.")
    return rank


def export_lora(patch: Patch, folder: Path, names: ModuleNames) -> None:
    """Write a patch as a LoRA of the embedding, which PEFT and vLLM without this package serve.

    A is [r, V] with a one for each token, B [d, r] holds the differences in float32. base + difference gives the row
    up to a rounding in the base's dtype. r is the next of the ranks that vLLM knows. Raises PatchError.
    """
    from peft import LoraConfig

    _check_lora(patch)
    k, (V, d) = len(patch.token_ids), (patch.meta.base.vocab_size, patch.meta.base.hidden_size)
    rank = _rank(patch)
    A, B = torch.zeros(rank, V), torch.zeros(d, rank)
    A[torch.arange(k), patch.token_ids] = 1
    B[:, :k] = (patch.rows.double() - patch.base_rows.double()).T.float()
    target = names.embedding.rpartition(".")[2]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[target], task_type="CAUSAL_LM",
        base_model_name_or_path=patch.meta.base.model_id, inference_mode=True,
    )  # fmt: skip
    key = f"base_model.model.{names.embedding}.lora_embedding_"
    _write(config, {f"{key}A": A, f"{key}B": B}, folder)


def split_lora(folder: Path, into: Path) -> None:
    """Write the LoRA part of an adapter that also has trained tokens into a folder of its own."""
    config = read_config(folder) | {"trainable_token_indices": None}
    tensors = {key: tensor for key, tensor in _read(folder).items() if not key.endswith(_DELTA)}
    (into / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, into / WEIGHTS)


def _exportable(patch: Patch) -> None:
    if patch.meta.scope != "all":
        raise PatchError("the patch acts on the prompt only, which an adapter cannot.")


def _write(config: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except OSError as error:
        raise PatchError(f"cannot write {folder}: {error.strerror or error}.") from error


def _read(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchError(f"cannot read {folder / WEIGHTS}: {error}.") from error


def _read_deltas(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.endswith(_DELTA)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchError(f"cannot read {folder / WEIGHTS}: {error}.") from error
