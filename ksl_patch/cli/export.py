"""`ksl-patch export`: a patch as a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import REFERENCE, base_option, json_option, revision_option


@click.command()
@click.argument("reference", metavar="P", type=REFERENCE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["trainable-tokens", "lora"]),
    required=True,
    help="PEFT's TrainableTokens, or a LoRA of the embedding, which vLLM serves without this package.",
)
@base_option("The patch's base, for its modules' names.", required=True)
@revision_option()
@click.option(
    "-o", "--output", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="Folder to write."
)
@json_option()
def export(reference: str, form: str, base: str, revision: str | None, output: Path, as_json: bool) -> None:
    """Write the patch P, a file or a name or digest of the local store, as an adapter that PEFT loads."""
    from ksl_patch.errors import PatchError
    from ksl_patch.hf import load_base
    from ksl_patch.interop import peft
    from ksl_patch.store.references import load

    patch = load(reference)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PatchError(f"{output} exists and is not an empty folder: give another.")
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
