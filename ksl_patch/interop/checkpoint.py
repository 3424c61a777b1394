"""A base with patches in its tables, as an ordinary checkpoint, which any engine loads without this package.

It is exact: a tied head that the patches leave alone gets a table of its own, and the configuration says so.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ksl_patch.base import find_embedding
from ksl_patch.base.tensors import row_bits
from ksl_patch.base.weight_files import table_in_files
from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch

SHARD = "5GB"
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*TERMS*", "*USE_POLICY*")


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
    if getattr(model, "is_quantized", False) or not table.plain or len(table.lookups) != 1:
        raise PatchError("the base's table is packed, or there are several: load it unquantised, with one embedding.")
    ids, head = patch.token_ids.to(table.device), table.head
    output = patch.rows if patch.output_rows is None else patch.output_rows
    whole = patch.meta.side == "input+output"
    untie = table.tied and not (whole and patch.output_rows is None)
    if untie:
        assert head is not None
        head.register_parameter("weight", nn.Parameter(table.weight.detach().clone(), requires_grad=False))
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    table.weight.data[ids] = patch.rows.to(table.device)
    if whole:
        assert head is not None
        head.get_parameter("weight").data[ids] = output.to(table.device)
    return untie


def write_checkpoint(
    model: Any, tokenizer: Any, merged: Patch, patches: Sequence[Patch], folder: Path, *, base: str, shard: str = SHARD
) -> bool:
    """Write a model with a patch's rows, its tokenizer and a card; whether its head was untied.

    merged: all rows, of `patches` together. folder: is not there yet, or empty; a write that fails leaves none. base:
    where the model came from, whose licence files are kept beside it. Raises PatchError.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            made = Path(name) / "model"
            untied = apply(merged, model)
            model.save_pretrained(made, max_shard_size=shard)
            tokenizer.save_pretrained(made)
            _check(made, merged)
            for file in {file for pattern in _TERMS for file in Path(base).glob(pattern) if file.is_file()}:
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


def _check(folder: Path, patch: Patch) -> None:
    """Raise PatchError unless the files have the patch's rows, bit for bit."""
    table = table_in_files(folder)
    if table is not None and not torch.equal(row_bits(table.rows(patch.token_ids)), row_bits(patch.rows)):
        raise PatchError(f"the files of the checkpoint do not have the rows of {patch.meta.name}: nothing was kept.")


def _digests(patches: Sequence[Patch]) -> str:
    """What is in the tables, for programs."""
    found = [
        {
            "name": patch.meta.name,
            "language": patch.meta.language,
            "digest": patch.digest,
            "token_ids": patch.token_ids.tolist(),
            "template": patch.meta.template and patch.meta.template.text,
        }
        for patch in patches
    ]
    return json.dumps({"patches": found}, indent=1, ensure_ascii=False) + "\n"


def card(patches: Sequence[Patch], base: str, *, rows: int, untied: bool) -> str:
    """The model card: what was changed, each patch's digest, and the prompt that it answers to."""
    from huggingface_hub import ModelCardData

    meta = patches[0].meta
    named = meta.base.model_id or base
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
    lines = [f"- {name}: {' '.join(str(value).split())}" for name, value in facts if value]
    prompt = meta.template.text if meta.template else "none is known"
    indented = "\n".join(f"    {line}" for line in prompt.split("\n"))
    return f"## {meta.name}\n\n" + "\n".join(lines) + f"\n\nIts prompt:\n\n{indented}"
