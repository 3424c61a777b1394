"""`ksl-patch words`: what the words of this command line mean."""

from __future__ import annotations

import json

import click

from ksl_patch.words import WORDS


@click.command()
@click.argument("word", required=False, type=click.Choice(list(WORDS), case_sensitive=False), metavar="[WORD]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def words(word: str | None, as_json: bool) -> None:
    """Say what ticket, slot, side, scope, D, p and other words mean: all of them, or WORD."""
    chosen = WORDS if word is None else {word: WORDS[word]}
    if as_json:
        click.echo(json.dumps(chosen))
        return
    formatter = click.HelpFormatter()
    formatter.write_dl(list(chosen.items()))
    click.echo(formatter.getvalue(), nl=False)
