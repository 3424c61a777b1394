"""`ksl-patch keygen`: a key to sign patches with."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import json_option


@click.command()
@click.option(
    "-o",
    "--output",
    default="ksl-patch.key",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Secret key to write.",
)
@json_option()
def keygen(output: Path, as_json: bool) -> None:
    """Make a key pair in minisign's format: OUTPUT, which only you can read, and OUTPUT.pub."""
    from ksl_patch.store.sign import generate

    public = generate(output)
    if as_json:
        click.echo(json.dumps({"secret": str(output), "public": f"{output}.pub", "id": str(public)}))
    else:
        click.echo(
            f"{output}, which has no password: keep it to yourself.\n{output}.pub: give this to others ({public})"
        )
