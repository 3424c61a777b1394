"""`ksl-patch pull`: a patch of the Hub into the local store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import check_free, force_option, json_option


@click.command()
@click.argument("reference", metavar="ORG/REPO[@REV][/FILE]")
@click.option("--name", metavar="NAME", help="The name it is to have; by default the one inside the file.")
@click.option("--key", type=click.Path(path_type=Path), help="Refuse it unless it is signed with this public key.")
@force_option("Move a name that is of a patch of another base or language.")
@json_option()
def pull(reference: str, name: str | None, key: Path | None, force: bool, as_json: bool) -> None:
    """Fetch a patch, and its signature where it has one, from the Hugging Face Hub into the local store.

    FILE may be left out where the repository has one patch. For a private repository sign in with `hf auth login`, or
    set HF_TOKEN. Offline, or with HF_HUB_OFFLINE=1, it comes from the Hub's cache.
    """
    from ksl_patch.patch import Patch
    from ksl_patch.store.hub import fetch
    from ksl_patch.store.local import Store
    from ksl_patch.store.sign import PublicKey, load_signed

    fetched = fetch(reference)
    patch = Patch.load(fetched.path) if key is None else load_signed(fetched.path, PublicKey.load(key))
    own, found = name or patch.meta.name, str(fetched.reference)
    store = Store()
    was = check_free(store, own, patch, force)
    path = store.add(patch, own, source=fetched.path)
    if as_json:
        click.echo(json.dumps({"name": own, "digest": patch.digest, "path": str(path), "reference": found}))
    else:
        click.echo(f"{own}: {patch.digest}{was}, from {found}")
