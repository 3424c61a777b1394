"""`ksl-patch import`: a PEFT adapter with trained tokens as a patch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.options import (
    base_model_option,
    base_option,
    check_output,
    json_option,
    new_patch_options,
    revision_option,
    starting,
)
from ksl_patch.terminal import counted

if TYPE_CHECKING:
    from ksl_patch.patch import TemplateMeta


@click.command("import")
@click.argument("adapter", metavar="FOLDER", type=click.Path(path_type=Path))
@base_option("The adapter's base: a local folder or a Hub id.", required=True)
@revision_option()
@new_patch_options("P")
@click.option("--language", metavar="L", help="Its language, a BCP 47 tag such as sw or pt-BR.")
@click.option(
    "--template",
    metavar="T",
    help="The prompt it was trained with: plain, chat (the base's chat template), or a text with {source}.  [default: "
    "none]",
)
@click.option("--system", metavar="TEXT", help="System prompt of the chat template.")
@click.option(
    "--source-language", default="en", metavar="L", help="Language of the sentences in a plain or chat template."
)
@base_model_option()
@click.option("--licence", metavar="L", help="Its licence, an SPDX identifier.")
@json_option()
def import_(
    adapter: Path, base: str, revision: str | None, output: Path, force: bool, name: str | None, language: str | None,
    template: str | None, system: str | None, source_language: str, base_model: str | None, licence: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Make a patch from PEFT's TrainableTokens adapter in FOLDER, alone or inside a LoRA adapter."""
    from ksl_patch.base.model_id import check_base_model
    from ksl_patch.errors import PatchError
    from ksl_patch.hf import load_base
    from ksl_patch.hf.loading import load_tokenizer
    from ksl_patch.interop import peft

    check_output(output, force)
    if not peft.names_tokens(peft.read_config(adapter)):
        raise PatchError(f"{adapter} has no trained tokens: a patch is made from PEFT's TrainableTokens.")
    check_base_model(base_model)
    if template in ("plain", "chat") and language is None:
        raise click.UsageError(f"--template {template} names the language: give --language.")
    if system is not None and template != "chat":
        raise click.UsageError("--system is of --template chat.")
    if template is not None:
        _check_template(template, source_language, language)
    starting(as_json)
    model, tokenizer = load_base(base, revision=revision, device="cpu")
    if any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(str(adapter))  # it may have tokens that the base's has not
    patch, more = peft.import_adapter(
        adapter, model, name=name or output.stem, tokenizer=tokenizer, language=language, licence=licence,
        template=None if template is None else _template(template, system, source_language, language, tokenizer),
    )  # fmt: skip
    if base_model is not None:
        patch = patch.with_meta(base=dataclasses.replace(patch.meta.base, model_id=base_model))
    patch.save(output)
    if as_json:
        click.echo(
            json.dumps({"path": str(output), "digest": patch.digest, "rows": len(patch.token_ids), "partial": more})
        )
        return
    click.echo(
        f"{output}: {counted(len(patch.token_ids), 'row')}, {output.stat().st_size:,} bytes, {patch.digest[:12]}"
    )
    if template is None:
        click.echo("Note: it names no prompt template; --template says the prompt that it was trained with.", err=True)
    if more:
        click.echo(
            "Warning: the adapter's LoRA weights were left out; a patch holds the trained tokens alone.", err=True
        )


def _check_template(kind: str, source: str, language: str | None) -> None:
    """Raise for what `build` would not train with, before anything is loaded."""
    from ksl_patch.data.languages import check_languages, language_name
    from ksl_patch.errors import RunError

    try:
        if kind in ("plain", "chat"):
            check_languages(source, language or "")
        else:
            language_name(source)
    except ImportError as error:
        raise click.ClickException(
            f"--template needs the train extra: pip install 'ksl-patch[train]' ({error})."
        ) from error
    if kind not in ("plain", "chat") and "{target}" in kind:
        raise RunError("the template must not hold the answer: remove {target}.")


def _template(kind: str, system: str | None, source: str, language: str | None, tokenizer: Any) -> TemplateMeta:
    from ksl_patch.data.templates import make_template

    return make_template(kind, source_language=source, language=language or "en", tokenizer=tokenizer, system=system)
