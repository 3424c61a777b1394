"""`ksl-patch words`: what the words of this command line mean."""

from __future__ import annotations

import json

import click

from ksl_patch.cli.options import json_option
from ksl_patch.words import WORDS


@click.command()
@click.argument("word", nargs=-1, metavar="[WORD]")
@json_option()
def words(word: tuple[str, ...], as_json: bool) -> None:
    """Say what ticket, slot, side, scope, D, p and other words mean: all of them, or WORD."""
    asked = " ".join(word).casefold()
    chosen = {name: meaning for name, meaning in WORDS.items() if asked in ("", name.casefold())}
    if not chosen:
        raise click.UsageError(f"there is no {' '.join(word)!r} among them: {', '.join(WORDS)}.")
    if as_json:
        click.echo(json.dumps(chosen))
        return
    formatter = click.HelpFormatter()
    formatter.write_dl(list(chosen.items()))
    click.echo(formatter.getvalue(), nl=False)
