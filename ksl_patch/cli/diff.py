"""`ksl-patch diff`: how one patch differs from another."""

from __future__ import annotations

import dataclasses
import json

import click

from ksl_patch.cli.options import REFERENCE, json_option


@click.command()
@click.argument("first", metavar="A", type=REFERENCE)
@click.argument("second", metavar="B", type=REFERENCE)
@click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Changed rows to show.")
@json_option("Print one JSON object, all rows included.")
def diff(first: str, second: str, rows: int, as_json: bool) -> None:
    """Compare two patches of one base: the tokens that only A or only B changes, and those that both change otherwise.

    For the last, the cosine of the two changes from the base's row and the norm of the difference. A and B are files,
    names or digests of the local store, or hf://ORG/REPO[@REV]/FILE. Exits with 0 when both do the same, else with 1.
    """
    from ksl_patch.merge import diff as compare
    from ksl_patch.merge import token_texts
    from ksl_patch.store.references import load

    a, b = load(first), load(second)
    found = compare(a, b)
    equal = not (found.added or found.removed or found.changed or found.settings)
    if as_json:
        print(json.dumps({
            "a": {"name": a.meta.name, "digest": a.digest}, "b": {"name": b.meta.name, "digest": b.digest},
            "equal": equal, **dataclasses.asdict(found),
        }))  # fmt: skip
    else:
        from rich.table import Table

        from ksl_patch.terminal import PlainConsole

        console = PlainConsole(width=None if PlainConsole().is_terminal else 120)
        for what, (one, other) in found.settings.items():
            console.print(f"{what}: {one!r} in {a.meta.name}, {other!r} in {b.meta.name}")
        console.print(
            f"{len(found.added)} tokens only in {second}, {len(found.removed)} only in {first}, {len(found.same)} with "
            f"the same row, {len(found.changed)} with another one",
        )
        tokens = token_texts(a, b)
        table = Table(box=None, pad_edge=False)
        for name in ("", "id", "token", "cosine of the changes", "norm of the difference"):
            is_text = name in ("", "token")
            table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
        lines = [("+", i, "", "") for i in found.added] + [("-", i, "", "") for i in found.removed]
        lines += [("~", row.token_id, f"{row.cosine:.3f}", f"{row.norm:.3f}") for row in found.changed]
        for mark, i, *numbers in lines[:rows]:
            text = json.dumps(tokens[i], ensure_ascii=False) if i in tokens else ""
            table.add_row(mark, str(i), text, *numbers)
        console.print(table)
        if len(lines) > rows:
            console.print(f"... and {len(lines) - rows} more; --rows shows them")
    raise click.exceptions.Exit(0 if equal else 1)
