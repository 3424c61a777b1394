"""`ksl-patch add`: patch files into the local store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import check_free, force_option, json_option


@click.command()
@click.argument("files", metavar="P...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--name",
    metavar="NAME",
    help="The name it is to have; by default the one inside the file, which it was built with. For one file.",
)
@force_option("Move a name that is of a patch of another base or language.")
@json_option("Print a JSON line for each.")
def add(files: tuple[Path, ...], name: str | None, force: bool, as_json: bool) -> None:
    """Put patch files, with their signatures, into the local store, where commands find them by name or digest."""
    if name is not None and len(files) > 1:
        raise click.UsageError("--name is for one file.")
    from ksl_patch.patch import Patch
    from ksl_patch.store.local import Store

    store = Store()
    patches = [Patch.load(file) for file in files]
    were = [check_free(store, name or patch.meta.name, patch, force) for patch in patches]
    for patch, file, was in zip(patches, files, were, strict=True):
        own = name or patch.meta.name
        path = store.add(patch, own, source=file)
        if as_json:
            click.echo(json.dumps({"name": own, "digest": patch.digest, "path": str(path)}))
        else:
            inside = "" if own in (name, file.stem) else f", the name inside {file}"
            click.echo(f"{own}: {patch.digest}{was}{inside}")
