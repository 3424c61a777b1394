"""A base with patches in its tables, as an ordinary checkpoint, which any engine loads without this package.

It is exact: a tied head that the patches leave alone gets a table of its own, and the configuration says so.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ksl_patch.base import find_embedding
from ksl_patch.base.identity import check_head
from ksl_patch.base.model_id import public_id
from ksl_patch.base.tensors import dtype_name
from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.wording import fenced

SHARD = "5GB"
_TERMS = re.compile(r"(licen[cs]e|notice|copying|use_policy|.*terms)[\w.-]*?(\.txt|\.md|\.html|\.pdf)?", re.IGNORECASE)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@torch.no_grad()
def apply(patch: Patch, model: Any) -> bool:
    """Put a patch's rows into a model's own tables; whether its head was untied for that.

    model: the patch's base, which is changed. Raises PatchError for a patch of scope "prompt", whose rows a plain model
    has everywhere, and for a model whose tables are packed or several.
    """
    if patch.meta.scope != "all":
        raise PatchError(
            f"{patch.meta.name} acts in prompts alone (scope prompt), and a plain model has its rows in answers too: "
            "it cannot be written into one."
        )
    table = find_embedding(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PatchError("the base is a PEFT adapter's folder: merge the adapter into its base, and give that.")
    if getattr(model, "is_quantized", False) or not table.plain or len(table.lookups) != 1:
        raise PatchError("the base's table is packed, or there are several: load it unquantised, with one embedding.")
    whole = patch.meta.side == "input+output"
    if whole:
        check_head(patch.meta.base, patch.token_ids, patch.base_rows, table)
    ids, head = patch.token_ids.to(table.device), table.head
    rows = _as_in(table.weight, patch.rows)
    output = rows if patch.output_rows is None else _as_in(table.weight, patch.output_rows)
    untie = table.tied and not (whole and patch.output_rows is None)
    if untie:
        assert head is not None
        head.register_parameter("weight", nn.Parameter(table.weight.detach().clone(), requires_grad=False))
        _own_tensors(model)
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    table.weight.data[ids] = rows
    if whole:
        assert head is not None
        head.get_parameter("weight").data[ids] = output
    return untie


def _as_in(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A patch's rows [k, d] as a table of another dtype or device has them. Raises PatchError where they overflow."""
    found = rows.to(table.device, table.dtype)
    if not found.isfinite().all():
        raise PatchError(f"the patch's rows are too large for the base's {dtype_name(table.dtype)}: load it wider.")
    return found


def _own_tensors(model: Any) -> None:
    """Give each name of a shared parameter a tensor of its own: with the head, a class may tie its bias, too."""
    seen: set[int] = set()
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                module.register_parameter(key, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def write_checkpoint(
    model: Any, tokenizer: Any, merged: Patch, patches: Sequence[Patch], folder: Path, *, base: str, shard: str = SHARD
) -> bool:
    """Write a model with a patch's rows, its tokenizer and a card; whether its head was untied.

    merged: all rows, of `patches` together. folder: is not there yet, or empty; a write that fails leaves none. base:
    where the model came from, whose licence files are kept beside it. Raises PatchError.
    """
    untied = apply(merged, model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            made = Path(name) / "model"
            model.save_pretrained(made, max_shard_size=shard)
            tokenizer.save_pretrained(made)
            _check(made, model)
            for file in _beside(base):
                shutil.copy(file, made / file.name)
            (made / "README.md").write_text(
                card(patches, base, rows=len(merged.token_ids), untied=untied), encoding="utf-8"
            )
            (made / "ksl_patch.json").write_text(_digests(patches), encoding="utf-8")
            if folder.is_dir():
                folder.rmdir()  # an empty one
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        raise PatchError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}.") from error
    return untied


def _beside(base: str) -> list[Path]:
    """The licences of a base in a folder, and what prepares pictures for it."""
    if not Path(base).is_dir():
        return []
    named = (file for file in sorted(Path(base).iterdir()) if _TERMS.fullmatch(file.name) or file.name in _PROCESSORS)
    return [file for file in named if file.is_file() and file.suffix != ".safetensors"]


def _check(folder: Path, model: Any) -> None:
    """Raise PatchError unless the files give this model again, every weight of it bit for bit."""
    try:
        again, found = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # of every kind, from transformers and what it builds on
        raise PatchError(f"the checkpoint cannot be loaded again ({error}): nothing was kept.") from error
    wrong = sorted(found["missing_keys"])
    own = again.state_dict()
    wrong += [
        name
        for name, tensor in model.state_dict().items()
        if name not in own or tensor.dtype != own[name].dtype or not torch.equal(tensor.cpu(), own[name])
    ]
    if wrong:
        raise PatchError(
            f"the checkpoint does not give the model again: {wrong[0]} differs, so nothing was kept; this architecture "
            "cannot be written."
        )


def _digests(patches: Sequence[Patch]) -> str:
    """What is in the tables, for programs."""
    found = [
        {
            "name": patch.meta.name,
            "language": patch.meta.language,
            "digest": patch.digest,
            "token_ids": patch.token_ids.tolist(),
            "side": patch.meta.side,
            "licence": patch.meta.licence,
            "template": patch.meta.template and asdict(patch.meta.template),
        }
        for patch in patches
    ]
    return json.dumps({"patches": found}, indent=1, ensure_ascii=False) + "\n"


def card(patches: Sequence[Patch], base: str, *, rows: int, untied: bool) -> str:
    """The model card: what was changed, each patch's digest, and the prompt that it answers to."""
    from huggingface_hub import ModelCardData

    meta = patches[0].meta
    named = _line(meta.base.model_id or public_id(base) or "a base")
    languages = [patch.meta.language.split("-")[0].lower() for patch in patches if patch.meta.language]
    data = ModelCardData(
        base_model=named, base_model_relation="finetune", library_name="transformers",
        language=list(dict.fromkeys(languages)) or None, tags=["embedding-patch", "ks-lottery"],
    )  # fmt: skip
    head = (
        "The base's head shares the embedding's table, and the patches leave the head alone: here it has a table of "
        "its own (`tie_word_embeddings` is false)."
        if untied
        else "Its head is as the base has it, with the patches' rows where they change it too."
    )
    sections = [_section(patch) for patch in patches]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {named} with {len(patches)} embedding patch{'es' * (len(patches) > 1)}\n\n"
        f"{rows} of the {meta.base.vocab_size:,} rows of the embedding table are other ones than the base's "
        f"(fingerprint `{meta.base.fingerprint[:12]}`); all other weights are the base's. {head} The base's licence "
        "applies, and each patch's own. A patch acts where a prompt has its tokens: give the prompt as it stands "
        "below, with the sentence at `{source}`.\n\n" + "\n\n".join(sections) + "\n"
    )


def _section(patch: Patch) -> str:
    meta = patch.meta
    facts = [
        ("language", meta.language),
        ("digest", f"`{patch.digest}`"),
        ("rows", str(len(patch.token_ids))),
        ("rows chosen by", meta.ticket and meta.ticket.rule),
        ("licence", meta.licence),
    ]
    lines = [f"- {name}: {value if name == 'digest' else _line(str(value))}" for name, value in facts if value]
    prompt = json.dumps(meta.template.text, ensure_ascii=False) if meta.template else "none is known"
    return (
        f"## {meta.name}\n\n" + "\n".join(lines) + "\n\nIts prompt, as a JSON string (`ksl_patch.json` has all of its "
        f"template):\n\n{fenced(prompt, 'json')}"
    )


def _line(text: str) -> str:
    """A text from a patch as text of one line, and no Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))
