"""`ksl-patch eval`: what a patch does on held-out pairs, beside the base and the controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.evidence import evidence_options, subject

if TYPE_CHECKING:
    from rich.table import Table

    from ksl_patch.evidence import Evaluation


@click.command(context_settings={"show_default": True})
@click.argument("reference", metavar="P")
@click.option(
    "--controls",
    default="all",
    metavar="LIST",
    help="all, none, or some of frequency,l2,random,noise; what is not trained yet is trained.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Training seeds: the patch's own, and those after it.",
)
@evidence_options
def eval(
    reference: str, controls: str, seeds: int, max_new_tokens: int | None, output: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Measure a patch on held-out pairs: the base, the tuned embedding, the patch, and the controls.

    Controls have as many rows as the patch: the most frequent tokens, those that moved farthest, random ones, and the
    patch's own rows moved as far in a random direction. Each gets chrF++ and BLEU of the raw output and of its first
    line, the share of outputs that end by themselves, their length, and the loss per target token, with paired
    bootstrap intervals of the difference from the base and of the patch's lead over it, over the held-out text. The
    result goes into the patch's metadata.

    The figures are of the pairs that the build held out. Choose between builds on its dev pairs, with --part dev.

    Everything trained and generated stays in the run folder: an evaluation that was cut off continues.
    """
    from ksl_patch.evidence import CONTROLS, SYSTEMS, Evaluation, write

    chosen = {"all": CONTROLS, "none": ()}.get(controls, tuple(part.strip() for part in controls.split(",")))
    if unknown := set(chosen) - set(CONTROLS):
        raise click.UsageError(
            f"there is no control {sorted(unknown)[0]!r}: all, none, or some of {','.join(CONTROLS)}."
        )
    with subject(reference, output=output, needs_build=False, **options) as it:
        from ksl_patch.train.compare import evaluate, make_systems

        old = it.replaced(Evaluation)
        if old is not None and not old.systems:
            old = None  # a build's loss
        before = {system.name: len(system.seeds) for system in old.systems} if old else {}
        less = [f"{before['patch']} training seeds"] if before.get("patch", 0) > seeds else []
        it.check_replaces(old, less)
        systems = make_systems(it.patch, it.build, chosen, seeds)
        gone = [SYSTEMS.get(name, name) for name in before if name not in systems and name != "base"]
        replaced = it.check_replaces(old, [*less, *gone])
        result = evaluate(
            it.model, it.tokenizer, it.held_out, systems, it.reporter, max_new_tokens=max_new_tokens,
            cache=it.build.outputs if it.build else None, part=it.part, uses=it.count_use(),
        )  # fmt: skip
        it.save(evaluation=write(result))
    if as_json:
        print(it.as_json(result))
        return
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140)
    console.print(table(result))
    for note in result.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)
    if it.target is not None:
        click.echo(f"Wrote the figures into {it.target}. {replaced}".rstrip())


def table(evaluation: Evaluation) -> Table:
    """The figures of every system; under each the interval of its difference from the base, the range over training
    seeds, and the patch's lead over it.
    """
    from rich.table import Table

    from ksl_patch.evidence import METRICS, against, interval, of_seeds, show

    seeds = max((len(system.seeds) for system in evaluation.systems), default=1)
    several = f", and the range of {seeds} training seeds" if seeds > 1 else ""
    result = Table(
        title=f"{evaluation.what}; in brackets the {evaluation.confidence or 0:.0%} interval of the difference from "
        f"the base{several}; below, the patch minus the system (of the loss, less is better)",
        title_justify="left",
    )
    result.add_column("")
    result.add_column("rows", justify="right")
    for label, _, _ in METRICS.values():
        result.add_column(label, justify="right")
    for system in evaluation.ordered:
        cells = []
        for metric in METRICS:
            figure = system.figures[metric]
            between, over, lead = interval(metric, figure), of_seeds(metric, figure), against(metric, figure)
            lines = [show(metric, figure.value), between and f"({between})", over and f"seeds {over}", lead]
            cells.append("\n".join(line for line in lines if line))
        result.add_row(system.label, system.size, *cells)
    return result
