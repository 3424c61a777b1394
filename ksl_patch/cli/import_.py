"""`ksl-patch import`: a PEFT adapter with trained tokens as a patch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import PATH_OR_ID


@click.command("import")
@click.argument("adapter", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--base", required=True, metavar="M", type=PATH_OR_ID, help="The adapter's base: a local folder or a Hub id."
)
@click.option("--revision", metavar="REV", help="Revision of the base on the Hub.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="P",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Patch to write.",
)
@click.option("--force", is_flag=True, help="Replace an existing patch.")
@click.option("--name", metavar="NAME", help="Name of the patch; by default the output file's.")
@click.option("--language", metavar="L", help="Its language, a BCP 47 tag such as sw or pt-BR.")
@click.option("--licence", metavar="L", help="Its licence, an SPDX identifier.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(
    adapter: Path, base: str, revision: str | None, output: Path, force: bool, name: str | None, language: str | None,
    licence: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Make a patch from PEFT's TrainableTokens adapter in FOLDER, alone or inside a LoRA adapter."""
    from ksl_patch.errors import PatchError
    from ksl_patch.hf import load_base
    from ksl_patch.hf.loading import load_tokenizer
    from ksl_patch.interop import peft

    if output.exists() and not force:
        raise PatchError(f"{output} exists: give another name, or --force to replace it.")
    if not peft.has_trainable_tokens(adapter):
        raise PatchError(f"{adapter} has no trained tokens: a patch is made from PEFT's TrainableTokens.")
    model, tokenizer = load_base(base, revision=revision, device="cpu")
    if any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(str(adapter))  # it may have tokens that the base's has not
    patch, more = peft.import_adapter(
        adapter, model, name=name or output.stem, tokenizer=tokenizer, language=language, licence=licence
    )
    patch.save(output)
    if as_json:
        click.echo(
            json.dumps({"path": str(output), "digest": patch.digest, "rows": len(patch.token_ids), "partial": more})
        )
        return
    click.echo(f"{output}: {len(patch.token_ids)} rows, {output.stat().st_size:,} bytes, {patch.digest[:12]}")
    if more:
        click.echo(
            "Warning: the adapter's LoRA weights were left out; a patch holds the trained tokens alone.", err=True
        )
