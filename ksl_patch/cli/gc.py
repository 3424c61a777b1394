"""`ksl-patch gc`: delete what the local store has no name for."""

from __future__ import annotations

import json

import click

from ksl_patch.cli.options import json_option


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what would go.")
@json_option("Print JSON.")
def gc(dry_run: bool, as_json: bool) -> None:
    """Delete the patches of the local store that have no name. Refused while a server reads from it."""
    from ksl_patch.store.local import Store

    gone = Store().gc(dry_run=dry_run)
    nbytes = sum(entry.nbytes for entry in gone)
    if as_json:
        click.echo(json.dumps({"deleted": [entry.digest for entry in gone], "bytes": nbytes, "dry_run": dry_run}))
        return
    for entry in gone:
        click.echo(entry.digest)
    click.echo(f"{len(gone)} patches, {nbytes:,} bytes{' would go' if dry_run else ' deleted'}.")
