"""A base with patches in its tables, as an ordinary checkpoint, which any engine loads without this package.

It is exact: a tied head that the patches leave alone gets a table of its own, and the configuration says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ksl_patch.base import find_embedding
from ksl_patch.base.identity import check_head
from ksl_patch.base.model_id import public_id
from ksl_patch.base.tensors import dtype_name
from ksl_patch.base.weight_files import values_in_files
from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.wording import fenced

SHARD = "5GB"
PATCHES = "ksl_patch.json"  # what is in the tables, for programs
_TERMS = [  # of the files' names, in letters of either case
    "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)
    for pattern in ("licen?e*", "notice*", "copying*", "*use_policy*", "*terms*")
]
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place whose files become those of `folder`, which is not there yet or empty, at the end of the block.

    The folder is made at once, so that one that cannot be is said before the work; what fails leaves none. Raises
    PatchError for whatever the file system refuses.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
            yield Path(name)
            # The configuration comes last: without it nothing loads a part of a model.
            for file in sorted(Path(name).iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(folder / file.name)
        missing = []
    except (OSError, SafetensorError) as error:
        raise PatchError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        for each in missing:
            with suppress(OSError):  # it was not made, or something else wrote into it
                each.rmdir()


def write_checkpoint(
    model: Any, tokenizer: Any, merged: Patch, patches: Sequence[Patch], made: Path, *, base: str,
    files: Path | None = None,
    shard: str = SHARD,
) -> tuple[bool, int]:  # fmt: skip
    """Write a model with a patch's rows, its tokenizer and a card into an empty folder.

    merged: all rows, of `patches` together. base: where the model came from. files: its folder, whose licences are kept
    beside the model. Returns whether the head was untied, and how many values of the base's files are not there, since
    transformers' class for the model has no place for them. Raises PatchError.
    """
    # Files of a tied model may hold its table once more, by the head's name.
    table = find_embedding(model)
    head = next((name for name, module in model.named_modules() if module is table.head), None)
    own = f"{head.rpartition('.')[2]}.weight" if head and table.tied else None
    untied = apply(merged, model)
    model.save_pretrained(made, max_shard_size=shard)
    tokenizer.save_pretrained(made)
    _check(made, model)
    before, after = None if files is None else values_in_files(files, own), values_in_files(made, own)
    lost = 0 if before is None or after is None else max(0, before - after)
    for file in [] if files is None else _beside(files):
        shutil.copy(file, made / file.name)
    text = card(patches, base, rows=len(merged.token_ids), untied=untied, lost=lost)
    (made / "README.md").write_text(text, encoding="utf-8")
    (made / PATCHES).write_text(_digests(patches), encoding="utf-8")
    return untied, lost


def files_of(base: str, revision: str | None = None) -> Path | None:
    """The folder of a base's files, of an id on the Hub that of its cache, with its licences; None where there is none.

    The Hub is asked for the licences only, since the model is there already.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    wanted = [*_TERMS, "*.safetensors.index.json", *_PROCESSORS]
    with suppress(Exception):  # of many kinds: no network, no such id
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))
    return None


def _beside(folder: Path) -> list[Path]:
    """The licences of a base, and what prepares pictures for it."""
    wanted = [*_TERMS, *_PROCESSORS]
    files = (file for file in sorted(folder.iterdir()) if any(fnmatchcase(file.name, each) for each in wanted))
    return [file for file in files if file.is_file() and file.suffix != ".safetensors"]


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


def card(patches: Sequence[Patch], base: str, *, rows: int, untied: bool, lost: int = 0) -> str:
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
    if lost:
        head += f" {missing(lost)}"
    sections = [_section(patch) for patch in patches]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {named} with {len(patches)} embedding patch{'es' * (len(patches) > 1)}\n\n"
        f"{rows} of the {meta.base.vocab_size:,} rows of the embedding table are other ones than the base's "
        f"(fingerprint `{meta.base.fingerprint[:12]}`); all other weights are the base's. {head} The base's licence "
        "applies, and each patch's own. A patch acts where a prompt has its tokens: give the prompt as it stands "
        "below, with the sentence at `{source}`.\n\n" + "\n\n".join(sections) + "\n"
    )


def missing(lost: int) -> str:
    """In words, what a written model has not of its base's files."""
    return (
        f"{lost:,} values of the base's files are not here, since transformers' class for it has no place for them (a "
        "head that drafts, say)."
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
    head = f"## {meta.name}\n\n" + "\n".join(lines) + "\n\n"
    if meta.template is None:
        parts = ", ".join(_line(origin.name) for origin in meta.origin or ())
        return head + f"It names no prompt{f': it was merged from {parts}, whose prompts it answers' if parts else ''}."
    rest = ["`ksl_patch.json` has all of its template"]
    if meta.template.chat:
        rest.append("it has its special tokens, so tokenise it with `add_special_tokens=False`")
    if meta.template.end_token_id is not None:
        rest.append(f"an answer ends with the token {meta.template.end_token_id}, so stop there (`eos_token_id`)")
    prompt = fenced(json.dumps(meta.template.text, ensure_ascii=False), "json")
    return head + f"Its prompt, as a JSON string ({'; '.join(rest)}):\n\n{prompt}"


def _line(text: str) -> str:
    """A text from a patch as text of one line, and no Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))
