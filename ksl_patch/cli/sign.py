"""`ksl-patch sign`: detached signatures of patch files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import json_option


@click.command()
@click.argument("files", metavar="P...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="Secret key, of `ksl-patch keygen` or minisign."
)
@json_option("Print a JSON line for each.")
def sign(files: tuple[Path, ...], key: Path, as_json: bool) -> None:
    """Sign patch files: P.minisig beside each, in minisign's format."""
    from ksl_patch.patch import Patch
    from ksl_patch.store.sign import sign as write

    for file in files:
        Patch.load(file)  # what is signed is a patch
        path = write(file, key)
        click.echo(json.dumps({"path": str(file), "signature": str(path)}) if as_json else str(path))
