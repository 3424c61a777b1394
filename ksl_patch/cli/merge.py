"""`ksl-patch merge`: one patch with the rows of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from ksl_patch.cli.options import REFERENCE, check_output, json_option, new_patch_options


@click.command()
@click.argument("first", metavar="A", type=REFERENCE)
@click.argument("second", metavar="B", type=REFERENCE)
@click.argument("others", metavar="[MORE...]", nargs=-1, type=REFERENCE)
@new_patch_options("C")
@click.option(
    "--on-conflict",
    type=click.Choice(["first", "second"]),
    help="Whose row to take where both change one token otherwise; without it that is an error.",
)
@json_option()
def merge(
    first: str, second: str, others: tuple[str, ...], output: Path, force: bool, name: str | None,
    on_conflict: Literal["first", "second"] | None, as_json: bool,
) -> None:  # fmt: skip
    """Make one patch of two or more for the same base. It says of every row which patch it came from.

    What was measured of A and B does not hold for C: evaluations and certificates are left out. A prompt template is
    kept where all have the same. Of more than two, the first is merged with the second, that with the third, and so on.
    """
    from ksl_patch.merge import merge_all
    from ksl_patch.store.references import load

    check_output(output, force)
    patches = [load(reference) for reference in (first, second, *others)]
    patch = merge_all(patches, name=name or output.stem, policy=on_conflict)
    patch.save(output)
    origin = [(each.name, each.digest, len(each.token_ids)) for each in patch.meta.origin or ()]
    dropped = patch.meta.template is None and any(each.meta.template for each in patches)
    if as_json:
        print(json.dumps({
            "path": str(output), "digest": patch.digest, "rows": len(patch.token_ids),
            "origin": [{"name": who, "digest": digest, "rows": n} for who, digest, n in origin],
            "template_dropped": dropped,
        }))  # fmt: skip
        return
    click.echo(
        f"Wrote {output}: {len(patch.token_ids)} rows ({', '.join(f'{n} of {who}' for who, _, n in origin)}), "
        f"{patch.digest[:12]}"
    )
    if dropped:
        click.echo(
            "They have different prompt templates, so it names none: a row acts in every prompt that has its token. "
            "The prompts are those of the patches it was made of; `export --format model` of these keeps them."
        )
