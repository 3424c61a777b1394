"""`ksl-patch lock`: write down what the patches of a deployment are."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import json_option


@click.command()
@click.argument("config", metavar="PATCHES.TOML", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 unless the lock is right.")
@json_option()
def lock(config: Path, check: bool, as_json: bool) -> None:
    """Write the lock of PATCHES.TOML beside it: the digest of every patch, for `ksl-patch serve --config --locked`."""
    from ksl_patch.store import lock as locks

    if check:
        locks.check_locked(config)
        click.echo(json.dumps({"locked": True}) if as_json else f"{locks.lock_path(config)} is right.")
        return
    written = locks.write_lock(config)
    if as_json:
        digests = {name: entry.digest for name, entry in written.patches.items()}
        click.echo(json.dumps({"path": str(locks.lock_path(config)), "patches": digests}))
    else:
        click.echo(f"{locks.lock_path(config)}: {len(written.patches)} patches")
