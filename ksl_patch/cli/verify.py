"""`ksl-patch verify`: is a patch file sound, and does it belong to a base?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import REFERENCE, base_option, json_option, revision_option
from ksl_patch.terminal import visible


@click.command()
@click.argument("reference", metavar="P", type=REFERENCE)
@base_option("Also check that the patch belongs to this base: a local folder or a Hub id.")
@revision_option()
@click.option("--key", type=click.Path(path_type=Path), help="Also check P.minisig with this public key.")
@json_option()
def verify(reference: str, base: str | None, revision: str | None, key: Path | None, as_json: bool) -> None:
    """Check a patch: that it is sound, with --base that it belongs to that model, with --key that it is signed.

    With --base it also says whether the patch is harmless outside its template: whether all its tokens are such that
    no text has them, by the base's own tokenizer; else how many tokens of a text in twenty languages it changes. Rows
    outside the base's own norms are named too.

    P is a file, a name or digest of the local store, or hf://ORG/REPO[@REV]/FILE. Exits with 0, or with 1
    and the reason.
    """
    from ksl_patch.cli.inspect import outside_in_words, with_base
    from ksl_patch.errors import BaseMismatchError, PatchError
    from ksl_patch.patch.wording import elsewhere_in_words
    from ksl_patch.store import sign
    from ksl_patch.store.references import resolve

    reason = digest = outside = elsewhere = None
    patch = Path(reference)
    try:
        patch, loaded, _ = resolve(reference)
        digest = loaded.digest
        if key is not None:
            sign.verify(patch, sign.PublicKey.load(key))
        if base is not None:
            outside, elsewhere = with_base(loaded, base, revision)
    except (PatchError, BaseMismatchError) as error:
        reason = str(error)
    if as_json:
        print(
            json.dumps({
                "path": str(patch), "valid": reason is None, "reason": reason, "digest": digest, "base": base,
                "outside": outside, "harmless": elsewhere and elsewhere.reserved,
                "touched_in_1000": elsewhere and round(elsewhere.per_thousand, 1),
            })
        )  # fmt: skip
    elif reason is None:
        more = f"{f', signed with {key}' if key else ''}{f', and its base is {base}' if base else ''}"
        click.echo(f"{patch}: valid{more} ({digest})")
        if elsewhere is not None:
            click.echo(elsewhere_in_words(elsewhere))
        for row in outside or ():
            click.echo(f"Note: {outside_in_words(row)}")
    else:
        click.echo(f"Error: {visible(str(reason))}", err=True)
    if reason is not None:
        raise click.exceptions.Exit(1)
