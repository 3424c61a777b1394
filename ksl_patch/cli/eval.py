"""`ksl-patch eval`: what a patch does on held-out pairs, beside the base and the controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.judging import evidence_options, subject
from ksl_patch.cli.options import REFERENCE

if TYPE_CHECKING:
    from rich.table import Table

    from ksl_patch.patch.evaluation import Evaluation


@click.command(context_settings={"show_default": True})
@click.argument("reference", metavar="P", type=REFERENCE)
@click.option(
    "--controls",
    default="all",
    metavar="LIST",
    help="all (which is ks,frequency,l2,random,reserved,noise, as far as there are such), none, or some of these and "
    "single, the best row of the template's: it trains a patch for each of the template's tokens. What is not trained "
    "yet is trained.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Training seeds: the patch's own, and those after it.",
)
@click.option("--alone", is_flag=True, help="Without the run folder: the patch on --base and --test alone.")
@evidence_options
def eval(
    reference: str, controls: str, seeds: int, max_new_tokens: int | None, output: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Measure a patch on held-out pairs: the base, the tuned embedding, the patch, and the controls.

    Controls have as many rows as the patch: those of largest KS distance, the most frequent tokens, those that moved
    farthest, random ones, reserved ones that stand before the prompt, and the patch's own rows moved as far in a random
    direction. Each gets chrF++ and BLEU of the raw output and of its first
    line, the share of outputs that end by themselves and of those in the target language, their length, and the loss
    per target token, with paired bootstrap intervals of the difference from the base and of the patch's lead over it,
    over the held-out text; and what it does to text in twenty languages and prompts that are not its task. The patch's
    gain in chrF++ is split into content and stopping. The result goes into the
    patch's metadata.

    The figures are of the pairs that the build held out. Choose between builds on its dev pairs, with --part dev.

    Everything trained and generated stays in the run folder: an evaluation that was cut off continues.
    """
    from ksl_patch.patch.evaluation import CONTROLS, SYSTEMS, Evaluation, write
    from ksl_patch.patch.wording import elsewhere_in_words, where_from, which_occur

    chosen = {"all": CONTROLS, "none": ()}.get(controls, tuple(part.strip() for part in controls.split(",")))
    if unknown := set(chosen) - {*CONTROLS, "single"}:
        raise click.UsageError(
            f"there is no control {sorted(unknown)[0]!r}: all, none, or some of {','.join(CONTROLS)},single."
        )
    with subject(reference, output=output, needs_build=False, as_json=as_json, **options) as it:
        from ksl_patch.evidence.evaluate import evaluate
        from ksl_patch.evidence.outputs import Cache
        from ksl_patch.evidence.systems import make_systems, prompts_of

        old = it.replaced(Evaluation)
        loss = "" if old is None or old.systems else f"It replaces the build's loss on {old.what}."
        old = None if loss else old
        before = {system.name: len(system.seeds) for system in old.systems} if old else {}
        less = (
            [f"{before['patch']} training seeds where this one has {seeds}"] if before.get("patch", 0) > seeds else []
        )
        it.check_replaces(old, less)
        own_rule = it.patch.meta.ticket and it.patch.meta.ticket.selection
        if own_rule in chosen and controls != "all":
            it.reporter.note("left_out", f"{own_rule} is the patch's own selection, and no control beside it")
        systems = make_systems(it.patch, it.build, chosen, seeds)
        gone = [SYSTEMS.get(name, name) for name in before if name not in systems and name != "base"]
        replaced = it.check_replaces(old, [*less, *(f"the system {name!r}" for name in gone)])
        result = evaluate(
            it.model, it.tokenizer, it.held_out, systems, it.reporter, max_new_tokens=max_new_tokens,
            cache=Cache.of(it.build) if it.build else None, part=it.part, uses=it.count_use(),
            source_language=it.build.config.source_language if it.build else None,
            prompts=prompts_of(it.patch, systems),
        )  # fmt: skip
        it.save(evaluation=write(result))
    if as_json:
        print(it.as_json(result))
        return
    from ksl_patch.terminal import PlainConsole
    from ksl_patch.words import explain

    console = PlainConsole(width=None if PlainConsole().is_terminal else 140)
    console.print(table(result, console.width))
    for sentence in (where_from(result), which_occur(result), elsewhere_in_words(result.elsewhere)):
        console.print(sentence)
    named = ["stops by itself", *(["noise"] if any(system.name == "noise" for system in result.systems) else [])]
    console.print(explain(*named))
    for note in result.notes:
        console.print(f"Note: {note}")
    if it.target is not None:
        click.echo(f"Wrote the figures into {it.target}. {replaced or loss}".rstrip())


def table(evaluation: Evaluation, width: int) -> Table:
    """For every system its figures: value, difference from the base, and the patch minus it, each with its interval.

    width: columns of the terminal; in 80 of them an interval is below its value.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ksl_patch.patch.wording import against, from_base, level_of, of_seeds, show

    level = f"{level_of([evaluation.confidence or 0])} interval"
    seeds = max((len(system.seeds) for system in evaluation.systems), default=1)
    several = f" and, below the value, the range of {seeds} training seeds" if seeds > 1 else ""
    title = f"{evaluation.what}; in brackets the {level}{several}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("", overflow="fold")
    for name in ("value", "minus the base", "patch minus it"):
        result.add_column(name, justify="right", overflow="fold")
    for system in evaluation.ordered:
        rows = f", {system.size} row{'' if system.size == '1' else 's'}" if system.size else ""
        result.add_row(Text(f"{system.label}{rows}", style="bold"))
        for metric, label in evaluation.metrics.items():
            figure = system.figures.get(metric)
            if figure is None:
                continue
            value = "\n".join(filter(None, (show(metric, figure.value), of_seeds(metric, figure))))
            both = from_base(metric, figure), against(metric, figure)
            result.add_row(f" {label}", value, *(text if width >= 100 else text.replace(" (", "\n(") for text in both))
    return result
