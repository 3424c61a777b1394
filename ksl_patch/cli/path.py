"""`ksl-patch path`: where a patch of the local store is."""

from __future__ import annotations

import json

import click

from ksl_patch.cli.options import STORED_NAME, json_option


@click.command()
@click.argument("reference", metavar="NAME|DIGEST", type=STORED_NAME)
@json_option()
def path(reference: str, as_json: bool) -> None:
    """Print the file of a name or digest of the local store, after checking what it holds."""
    from ksl_patch.store.local import Store

    store = Store()
    digest = store.get(reference).digest
    click.echo(json.dumps({"digest": digest, "path": str(store.path(digest))}) if as_json else store.path(digest))
