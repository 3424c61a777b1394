"""`ksl-patch remove`: forget a name of the local store."""

from __future__ import annotations

import json

import click

from ksl_patch.cli.options import STORED_NAME, json_option


@click.command()
@click.argument("names", metavar="NAME...", type=STORED_NAME, nargs=-1, required=True)
@json_option("Print a JSON line for each.")
def remove(names: tuple[str, ...], as_json: bool) -> None:
    """Forget names of the local store; `ksl-patch gc` deletes what has no name left."""
    from ksl_patch.store.local import Store

    for name in names:
        digest = Store().remove(name)
        click.echo(json.dumps({"name": name, "digest": digest}) if as_json else f"{name}: forgotten ({digest[:12]})")
