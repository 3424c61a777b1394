"""`ksl-patch export`: a patch as a PEFT adapter, or patches in a model of their own."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ksl_patch.cli.options import REFERENCE, base_option, json_option, revision_option

if TYPE_CHECKING:
    from ksl_patch.patch import Patch


@click.command(context_settings={"show_default": True})
@click.argument("references", metavar="P...", nargs=-1, required=True, type=REFERENCE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["trainable-tokens", "lora", "model"]),
    required=True,
    help="PEFT's TrainableTokens; a LoRA of the embedding, which vLLM serves without this package; or the whole model "
    "with the rows of one or several patches, which any engine serves.",
)
@base_option("The patches' base.", required=True)
@revision_option()
@click.option("--shard", metavar="SIZE", default="5GB", help="Largest file of a model, such as 500MB.")
@click.option(
    "-o", "--output", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="Folder to write."
)
@json_option()
def export(
    references: tuple[str, ...], form: str, base: str, revision: str | None, shard: str, output: Path, as_json: bool
) -> None:
    """Write the patch P, a file or a name or digest of the local store, in a form that others load.

    As a model, several patches that do not change the same tokens go into one: build them with --selection reserved and
    --beside, and each speaks its language by its own prompt.
    """
    from ksl_patch.errors import PatchError
    from ksl_patch.hf import load_base
    from ksl_patch.store.references import load

    if form != "model" and len(references) > 1:
        raise click.UsageError("an adapter holds one patch: merge them first, or write --format model.")
    if form == "model" and not _is_size(shard):
        raise click.UsageError(f"--shard is a size such as 500MB or 5GB, not {shard!r}.")
    patches = list({patch.digest: patch for patch in map(load, references)}.values())
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PatchError(f"{output} exists and is not an empty folder: give another.")
    if form == "model":
        # A request to end is an interrupt, after which no half-written folder stays.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _model(patches, base, revision, shard, output, as_json)
        return
    from ksl_patch.interop import peft

    patch = patches[0]
    model, tokenizer = load_base(base, revision=revision, device="cpu")
    patch.check(model, tokenizer)
    if form == "lora" and not as_json:
        size = peft.lora_bytes(patch)
        click.echo(
            f"Writing {size / 1e6:,.1f} MB: a LoRA of the embedding has a column for each of the base's "
            f"{patch.meta.base.vocab_size:,} tokens, where the patch has {patch.rows.nbytes / 1e3:,.0f} kB of rows.",
            err=True,
        )
    write = peft.export_trainable_tokens if form == "trainable-tokens" else peft.export_lora
    try:
        write(patch, output, peft.module_names(model))
    except ImportError as error:
        raise PatchError("PEFT is not installed: pip install 'ksl-patch[peft]'.") from error
    nbytes = (output / peft.WEIGHTS).stat().st_size
    if as_json:
        click.echo(json.dumps({"path": str(output), "format": form, "bytes": nbytes}))
    else:
        click.echo(f"{output}: {form}, {nbytes:,} bytes")


def _is_size(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,5}[KMG]B", text, re.IGNORECASE) is not None


def _model(patches: list[Patch], base: str, revision: str | None, shard: str, output: Path, as_json: bool) -> None:
    from transformers import AutoConfig

    from ksl_patch.errors import PatchError
    from ksl_patch.hf import load_base
    from ksl_patch.interop.checkpoint import files_of, new_folder, write_checkpoint
    from ksl_patch.interop.model_card import missing, mixed
    from ksl_patch.merge import merge_all

    try:
        merged = merge_all(patches, name="merged")
    except PatchError as error:
        asked = str(error).partition(": say whose rows")[0]
        raise PatchError(
            f"{asked}: they do not fit into one model. Build reserved rows with --beside, or merge first, with "
            "--on-conflict."
        ) from error
    with new_folder(output) as made:
        if not as_json:
            click.echo(f"Loading {base} ...", err=True)
        model, tokenizer = load_base(base, revision=revision, device="cpu")
        whole, own = AutoConfig.from_pretrained(base, revision=revision).architectures or [], type(model).__name__
        if whole and own not in whole and not whole[0].endswith("Model"):  # such as LlamaModel, without a head
            raise PatchError(
                f"the base is a {whole[0]}, of which its language model alone ({own}) was loaded: the rest would be "
                "missing in the written model."
            )
        for patch in patches:
            patch.check(model, tokenizer)
        files = files_of(base, revision)
        done = write_checkpoint(model, tokenizer, merged, patches, made, base=base, files=files, shard=shard)
    if files is None and not as_json:
        click.echo(f"The licences of {base} could not be had, and are not beside the model.", err=True)
    nbytes = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        digests = [patch.digest for patch in patches]
        print(json.dumps({
            "path": str(output), "format": "model", "bytes": nbytes, "patches": digests, "untied": done.untied,
            "values_left_out": done.lost, "in_texts": done.in_texts,
        }))  # fmt: skip
        return
    head = "; its head, which was tied to the embedding, has a table of its own" if done.untied else ""
    click.echo(
        f"{output}: the base with {len(merged.token_ids)} rows of {len(patches)} "
        f"{'patch' if len(patches) == 1 else 'patches'}, {nbytes:,} bytes{head}"
    )
    if done.in_texts:
        click.echo(mixed(done.in_texts))
    if done.lost:
        click.echo(missing(done.lost))
