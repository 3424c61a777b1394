"""A base with patches in its tables, as an ordinary checkpoint, which any engine loads without this package.

It is exact: a tied head that the patches leave alone gets a table of its own, and the configuration says so.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from ksl_patch.base import find_embedding
from ksl_patch.base.identity import check_head, has_other_weights
from ksl_patch.base.model_id import public_id
from ksl_patch.base.reserved import ReservedTokens
from ksl_patch.base.tensors import dtype_name
from ksl_patch.base.weight_files import values_in_files
from ksl_patch.errors import PatchError
from ksl_patch.interop.model_card import card, entry, entry_section
from ksl_patch.patch import Patch

SHARD = "5GB"
PATCHES = "ksl_patch.json"  # what is in the tables, for programs
_MOST = 64 * 2**20  # bytes of that file
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


class Written(NamedTuple):
    """What became of a model. untied: its head was. lost: values of the base's files that transformers' class for it
    has no place for. in_texts: patches with rows of tokens that texts have, beside others.
    """

    untied: bool
    lost: int
    in_texts: list[str]


def ids_inside(model: Any) -> set[int]:
    """The token ids whose rows are those of patches that `write_checkpoint` wrote the model with."""
    return set(getattr(model.config, "ksl_patch_rows", None) or ())


def write_checkpoint(
    model: Any, tokenizer: Any, merged: Patch, patches: Sequence[Patch], made: Path, *, base: str,
    files: Path | None = None,
    shard: str = SHARD,
) -> Written:  # fmt: skip
    """Write a model with a patch's rows, its tokenizer and a card into an empty folder.

    merged: all rows, of `patches` together. base: where the model came from. files: its folder, whose licences are kept
    beside the model, and what patches it has inside already. Raises PatchError.
    """
    inside, own_ids = _inside(model, files), merged.token_ids.tolist()
    if both := sorted(ids_inside(model).intersection(own_ids)):
        raise PatchError(
            f"the base has patches inside already, and token {both[0]} is one of theirs, so its row would be lost: "
            "build reserved rows on this base, which take other tokens."
        )
    named = public_id(base) if any(has_other_weights(patch.meta.base, model) for patch in patches) else None
    # Files of a tied model may hold its table once more, by the head's name.
    table = find_embedding(model)
    head = next((name for name, module in model.named_modules() if module is table.head), None)
    own = f"{head.rpartition('.')[2]}.weight" if head and table.tied else None
    untied = apply(merged, model)
    model.config.ksl_patch_rows = sorted(ids_inside(model).union(own_ids))
    model.save_pretrained(made, max_shard_size=shard)
    tokenizer.save_pretrained(made)
    _check(made, model)
    before, after = None if files is None else values_in_files(files, own), values_in_files(made, own)
    lost = 0 if before is None or after is None else max(0, before - after)
    for file in [] if files is None else _beside(files):
        shutil.copy(file, made / file.name)
    entries, reserved = [*inside, *map(entry, patches)], ReservedTokens(tokenizer, model)
    in_texts = [each["name"] for each in entries if any(reserved.why_not(i) for i in each["token_ids"])]
    in_texts = in_texts if len(entries) > 1 else []
    text = card(
        patches, base, rows=len(merged.token_ids), untied=untied, lost=lost, inside=inside, other=named,
        in_texts=in_texts,
    )  # fmt: skip
    (made / "README.md").write_text(text, encoding="utf-8")
    (made / PATCHES).write_text(json.dumps({"patches": entries}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Written(untied, lost, in_texts)


def _inside(model: Any, files: Path | None) -> list[dict[str, Any]]:
    """What a base's own list says of the patches inside it. Raises PatchError where it has some and no such list."""
    if not ids_inside(model):
        return []
    try:
        if files is None:
            raise OSError("its files could not be had")
        with (files / PATCHES).open("rb") as file:
            content = file.read(_MOST + 1)
        if len(content) > _MOST:
            raise ValueError("it is too long")
        entries = json.loads(content)["patches"]
        if {i for each in entries for i in each["token_ids"]} != ids_inside(model):
            raise ValueError("it has other tokens than config.json")
        for each in entries:
            entry_section(each)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PatchError(f"the base has patches inside, and its {PATCHES} does not say which ({error}).") from error
    return list(entries)


def files_of(base: str, revision: str | None = None) -> Path | None:
    """The folder of a base's files, of an id on the Hub that of its cache, with its licences; None where there is none.

    The Hub is asked for the licences only, since the model is there already.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    wanted = [*_TERMS, "*.safetensors.index.json", PATCHES, *_PROCESSORS]
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
