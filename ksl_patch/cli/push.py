"""`ksl-patch push`: a patch onto the Hub, with a model card."""

from __future__ import annotations

import json

import click

from ksl_patch.cli.options import REFERENCE, json_option


@click.command()
@click.argument("reference", metavar="P", type=REFERENCE)
@click.argument("repo", metavar="ORG/REPO")
@click.option("--name", metavar="NAME", help="Upload as NAME.safetensors; by default the file's name.")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", metavar="TEXT", help="Commit message.")
@click.option("--base-model", metavar="ID", help="The base's id on the Hub, where the patch was built from a folder.")
@json_option()
def push(
    reference: str, repo: str, name: str | None, private: bool, revision: str | None, create_pr: bool,
    message: str | None, base_model: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Upload a patch, its signature where it has one, and a model card made from what the patch says.

    P is a file, or a name or digest of the local store. The repository is made where it is not there. A repository may
    hold several patches: the card keeps what it says of the others. Sign in with `hf auth login`, or set HF_TOKEN.
    """
    from ksl_patch.store import hub
    from ksl_patch.store.local import is_digest
    from ksl_patch.store.references import resolve

    path, patch, _ = resolve(reference)
    own = name or (patch.meta.name if is_digest(path.stem) else path.stem)
    url = hub.push(
        path, own, repo, revision=revision, private=private, create_pr=create_pr, message=message, base_model=base_model
    )
    where = str(hub.HubReference(repo, revision, f"{own}.safetensors"))
    if as_json:
        click.echo(json.dumps({"reference": where, "digest": patch.digest, "url": url}))
    else:
        click.echo(f"{where}: {patch.digest[:12]}, {url}")
