"""`ksl-patch inspect`: what a patch file says."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.options import REFERENCE, base_option, json_option

if TYPE_CHECKING:
    from ksl_patch.patch import Patch
    from ksl_patch.patch.evaluation import Elsewhere


@click.command()
@click.argument("reference", metavar="P", type=REFERENCE)
@click.option("--rows", type=click.IntRange(0), default=40, show_default=True, help="Rows to show, largest D first.")
@base_option("Also name rows whose norm none of the base's own has.")
@json_option("Print everything as one JSON object.")
def inspect(reference: str, rows: int, base: str | None, as_json: bool) -> None:
    """Show a patch: its rows as tokens with D, p and norms, its base, its training, its size.

    P is a file, a name or digest of the local store, or hf://ORG/REPO[@REV]/FILE.
    """
    from ksl_patch.store.references import resolve

    patch, loaded, _ = resolve(reference)
    size = patch.stat().st_size
    outside, elsewhere = (None, None) if base is None else with_base(loaded, base)
    if as_json:
        meta = dataclasses.asdict(loaded.meta)
        print(
            json.dumps({
                "path": str(patch), "bytes": size, "digest": loaded.digest, **meta, "rows": loaded.row_facts(),
                "outside": outside, "elsewhere": elsewhere and dataclasses.asdict(elsewhere),
            })
        )  # fmt: skip
    else:
        _print(loaded, size, rows, elsewhere)
        for row in outside or ():
            click.echo(f"Note: {outside_in_words(row)}")


def with_base(patch: Patch, base: str, revision: str | None = None) -> tuple[list[dict[str, Any]], Elsewhere]:
    """Rows of other norms than the base's (`Patch.outside`), and what the patch changes outside its template.

    Raises BaseMismatchError for another base, PatchError where the patch calls its tokens reserved and one is not.
    """
    from ksl_patch.base import find_embedding
    from ksl_patch.errors import PatchError
    from ksl_patch.evidence.elsewhere import not_reserved, touched
    from ksl_patch.hf import load_base

    model, tokenizer = load_base(base, revision=revision, device="cpu")
    patch.check(model, tokenizer)
    wrong = not_reserved(patch, tokenizer, model)
    if wrong and patch.meta.ticket and patch.meta.ticket.selection == "reserved":
        i, why = next(iter(wrong.items()))
        raise PatchError(
            f"the patch calls its tokens reserved, and {len(wrong)} of them are not in this base, so it changes other "
            f"text: token {i}: {why}."
        )
    return patch.outside(find_embedding(model)), touched(patch, tokenizer, model)


def outside_in_words(row: dict[str, Any]) -> str:
    """A row of `Patch.outside` in a sentence."""
    return (
        f"the row of token {row['token_id']} has the norm {row['norm']:.3g}, far from the base's own rows', which have "
        f"{row['smallest']:.3g} to {row['largest']:.3g}: a stronger control than any text is."
    )


def _print(patch: Patch, size: int, limit: int, elsewhere: Elsewhere | None) -> None:
    from rich.table import Table

    from ksl_patch.errors import PatchError
    from ksl_patch.patch.evaluation import Evaluation, read
    from ksl_patch.patch.wording import elsewhere_in_words, known_elsewhere, occurrence_table, which_occur
    from ksl_patch.terminal import PlainConsole, counted
    from ksl_patch.words import explain

    meta, base = patch.meta, patch.meta.base
    console = PlainConsole()
    facts: list[tuple[str, str]] = []

    def fact(name: str, value: object) -> None:
        if value is not None:
            facts.append((name, str(value)))

    fact("patch", meta.name)
    fact("language", meta.language)
    fact("digest", f"{patch.digest} (of what it does)")
    fact("size", f"{counted(len(patch.token_ids), 'row')} of {base.hidden_size} in {base.dtype}, {size:,} bytes")
    side = "the embedding's rows" if meta.side == "input" else "the embedding's rows and the head's"
    fact("side", f"{meta.side}: {side}")
    fact(
        "scope", f"{meta.scope}: the rows act in the prompt{' alone' if meta.scope == 'prompt' else ' and the answer'}"
    )
    fact("base", f"{base.model_id or 'unnamed'}{'@' + base.revision if base.revision else ''}, {base.vocab_size} tokens"
         f"{', tied head' if base.tied else ''}, fingerprint {base.fingerprint[:12]}")  # fmt: skip
    if meta.template:
        fact("template", repr(meta.template.text))
        fact("for the base", meta.template.unpatched and repr(meta.template.unpatched))
    if meta.ticket:
        level = meta.ticket.level
        weak = sum(p >= level for p in meta.ticket.pvalue or ())
        fact("ticket", meta.ticket.rule + (f", {counted(weak, 'row')} of these with p >= {level:g}" if weak else ""))
    if meta.training:
        t = meta.training
        fact("training", f"{t.mode}, read {t.read}, {t.tunings}, seed {t.seed}")
        fact("optimiser", t.settings or None)
    try:
        evaluation = read(Evaluation, meta.evaluation)
    except PatchError:  # another tool's
        evaluation = None
    if evaluation is not None:
        fact("loss", f"{evaluation.loss_base:.3f} base, {evaluation.loss_patch:.3f} patch, on {evaluation.what}")
    fact("elsewhere", elsewhere_in_words(elsewhere) or known_elsewhere(meta) or None)
    if meta.origin:
        fact("merged from", ", ".join(f"{o.name} {o.digest[:12]} ({len(o.token_ids)} rows)" for o in meta.origin))
    fact("licence", meta.licence)
    fact("created", meta.created)
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column(overflow="fold")
        for line in facts:
            grid.add_row(*line)
        console.print(grid)
    else:  # a prompt in it may be copied
        for name, value in facts:
            console.print(f"{name:<14}{value}", soft_wrap=True)

    parts, occur = occurrence_table(evaluation)
    rows = sorted(patch.row_facts(), key=lambda row: -(row["statistic"] or 0))
    table = Table(box=None, pad_edge=False)
    for name in ("id", "token", "D", "p", "|base|", "|change|", *parts):
        is_text = name == "token"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in rows[:limit]:
        table.add_row(
            str(row["token_id"]),
            "" if row["token"] is None else json.dumps(row["token"], ensure_ascii=False),
            *(
                "" if row[key] is None else f"{row[key]:{form}}"
                for key, form in (("statistic", ".4f"), ("pvalue", ".2g"))
            ),
            f"{row['base_norm']:.3f}",
            f"{row['change_norm']:.3f}",
            *occur.get(row["token_id"], ()),
        )
    console.print(table)
    if evaluation is not None and parts:
        where = f"{', '.join(parts[:-1])}: how often the token is read there in the {evaluation.what}. "
        console.print(where + which_occur(evaluation))
    if meta.ticket and meta.ticket.pvalue:
        console.print(explain("D", "p"))
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more; --rows shows them")
