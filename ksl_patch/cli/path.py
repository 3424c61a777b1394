"""`ksl-patch path`: where a patch of the local store is."""

from __future__ import annotations

import click


@click.command()
@click.argument("reference", metavar="NAME|DIGEST")
def path(reference: str) -> None:
    """Print the file of a name or digest of the local store, after checking what it holds."""
    from ksl_patch.store.local import Store

    store = Store()
    click.echo(store.path(store.get(reference).digest))
