"""`ksl-patch build`: from a base and sentence pairs to a patch."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from ksl_patch.cli.options import (
    PATH_OR_ID,
    TRAIN,
    base_model_option,
    base_option,
    check_output,
    columns_option,
    device_option,
    json_option,
    kept_run,
    needing,
    new_patch_options,
    one_or_several,
    revision_option,
    starting,
)
from ksl_patch.cli.settings import MOST_STEPS, PRESETS, Steps, given_in, settings_of
from ksl_patch.terminal import counted


def named_rows(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str | int, ...]:
    """`--rows`: an integer is an id, a JSON text or list is read, anything else is a text with backslash escapes."""
    found: list[str | int] = []
    for value in values:
        read: Any = None
        if value[:1] in ("[", '"') and len(value) > 1:
            with suppress(ValueError, RecursionError):
                read = json.loads(value)
        if isinstance(read, list) and read and all(type(each) in (str, int) for each in read):
            found += read
        elif isinstance(read, str):
            found.append(read)
        elif re.fullmatch("[0-9]{1,9}", value):
            found.append(int(value))
        else:
            found.append(value.replace("\\n", "\n").replace("\\t", "\t"))
    if not all(each or each == 0 for each in found):
        raise click.UsageError("--rows takes a token's id, its name or its text, and one of them is empty.")
    return tuple(found)


@click.command(context_settings={"show_default": True})
@base_option("Base model: a local folder or a Hub id.  [required]")
@base_model_option()
@revision_option()
@click.option(
    "--pairs",
    multiple=True,
    callback=one_or_several,
    metavar="F",
    type=PATH_OR_ID,
    help="Sentence pairs: .jsonl, .json, .csv, .tsv or .parquet, as .gz or .zst too; two files with a sentence a line "
    "each (--pairs train.en --pairs train.sw); or a Hugging Face dataset id[@revision][:config[:split]]. Several files "
    "are read one after the other.  [required]",
)
@click.option("--strict", is_flag=True, help="Refuse a line that is no pair, where such are counted and left out.")
@columns_option("Names of the two columns of the pairs.")
@click.option(
    "--group",
    metavar="COLUMN",
    help="Column with the document of a pair; documents are held out whole.  [default: none]",
)
@click.option("--language", metavar="L", help="Target language, a BCP 47 tag such as sw or pt-BR.  [required]")
@click.option("--source-language", default="en", metavar="L", help="Language of the source sentences.")
@new_patch_options("P", required=False)
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Other defaults: paper has those of KS-Lottery's experiments, as far as they are known "
    "(examples/paper). Options that are given count.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="F",
    help="Build the patches that this patches.toml says how to build, or those of the names that follow, in place of "
    "-o P. Options count for all of them.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="With --config: build them side by side as tasks of Ray, on this machine or on the cluster of this address, a "
    "GPU each or --ray-cpus cores. The folders of the patches are on storage that all nodes share.",
)
@click.option("--ray-cpus", type=click.IntRange(1), default=2, metavar="N", help="Cores of a task of Ray without GPU.")
@click.option(
    "--template",
    default="plain",
    metavar="T",
    help="plain, alpaca, chat (the base's chat template), soft (reserved rows around the sentence, no words), or a "
    "text with {source}, {reserved} for reserved rows, and {NAME} for other columns of the pairs.",
)
@click.option("--system", metavar="TEXT", help="System prompt of the chat template; it may have {NAME} too.")
@click.option(
    "--selection",
    type=click.Choice(["ks", "frequency", "l2", "random", "single", "reserved"]),
    default="ks",
    help="How the rows are chosen; frequency, l2, random and reserved need --top-k. single is one row: of the "
    "template's tokens, each trained alone, the one with the lowest loss on the dev pairs. reserved are tokens of the "
    "vocabulary that no text has, put into the template: nothing else is changed.",
)
@click.option(
    "--start",
    type=click.Choice(["text", "base"]),
    default="text",
    help="Reserved rows: train them from the base's rows of the instruction's tokens, or from their own.",
)
@click.option(
    "--beside",
    multiple=True,
    metavar="P",
    help="Reserved rows: take other tokens than this patch, so that the two merge. Give it several times for several.",
)
@click.option(
    "--rows",
    multiple=True,
    metavar="TOKEN",
    callback=named_rows,
    help="Take this row, whatever a test says: an id, a name such as '<bos>', a text such as '\\n' or '\",\"', or a "
    "JSON list of them. Give it several times for several rows.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True),
    help="Ticket: rows whose KS test has p < alpha; p ranks rows and is no calibrated probability.  [default: 0.05 "
    "without --top-k]",
)
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Ticket: at most the K rows of largest D.")
@click.option(
    "--mode",
    type=click.Choice(["partial", "transfer"]),
    default="partial",
    help="Tune the ticket's rows from the base, or take them from the tuned embedding.",
)
@click.option(
    "--side",
    type=click.Choice(["input", "input+output"]),
    default="input",
    help="Patch the embedding only, or the tied head's rows too.",
)
@click.option(
    "--scope",
    type=click.Choice(["all", "prompt"]),
    default="all",
    help="Where the rows act, in training and when served: everywhere, or in the prompt alone.",
)
@click.option("--embed-steps", type=click.IntRange(1), default=100, help="Steps of the embedding tuning.")
@click.option(
    "--embed-lr",
    type=click.FloatRange(0, min_open=True),
    default=0.15,
    help="Its learning rate, in standard deviations of the table's values.",
)
@click.option(
    "--damp-rare/--no-damp-rare",
    default=True,
    help="Let a row that few pairs touch move less in it, by a large epsilon of Adam. It decides how frequent the "
    "tokens of a ticket are: see docs/experiments.md.",
)
@click.option(
    "--steps",
    type=Steps(),
    metavar="N|auto",
    default=100,
    help=f"Steps of the partial tuning; with auto it ends when the loss on validation pairs falls no more, after "
    f"{MOST_STEPS} at most, and the best rows are kept.",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=0.15, help="Its learning rate, in the same unit."
)
@click.option(
    "--epochs",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="In place of --steps: read each training pair so often.",
)
@click.option("--embed-epochs", type=click.FloatRange(0, min_open=True), metavar="N", help="In place of --embed-steps.")
@click.option(
    "--schedule", type=click.Choice(["linear", "cosine"]), default="linear", help="How learning rates fall to 0."
)
@click.option(
    "--warmup",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="SHARE",
    help="The share of a tuning's steps in which its learning rate rises first.",
)
@click.option(
    "--absolute-lr", is_flag=True, help="Learning rates are in no unit of the table's: the optimiser's, as papers say."
)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Pairs in a step, on each process.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Batches in a step.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of everything random.")
@click.option(
    "--data-seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="SEED",
    default=0,
    help="Seed of the split into training, validation, dev and held-out pairs.",
)
@click.option("--dev", type=click.IntRange(0), default=64, help="Pairs kept from training to compare builds on.")
@click.option(
    "--validation", type=click.IntRange(1), default=64, help="Pairs kept from training for --steps auto to stop by."
)
@click.option(
    "--held-out", type=click.IntRange(0), default=64, help="Pairs kept from training and choices, for eval's figures."
)
@click.option("--max-pairs", type=click.IntRange(1), help="Train on at most this many pairs.")
@click.option("--max-length", type=click.IntRange(8), default=256, help="Leave out pairs of more tokens than this.")
@click.option(
    "--resume",
    "run",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the run's checkpoints; a build continues from what is there.  [default: P.run]",
)
@click.option(
    "--checkpoint-every", type=click.IntRange(1), default=25, metavar="STEPS", help="Steps between checkpoints."
)
@click.option("--licence", metavar="SPDX", help="Licence of the patch, such as CC-BY-4.0.")
@device_option("Where to train.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask about what looks wrong: warn, and go on.")
@json_option("Print JSON lines instead of progress bars.")
@click.argument("more", nargs=-1, metavar="")
@click.pass_context
def build(
    context: click.Context, /, more: tuple[str, ...], config: Path | None, run: Path | None, yes: bool, as_json: bool,
    force: bool, ray: str | None, ray_cpus: int, **options: Any,
) -> None:  # fmt: skip
    """Build a patch for one language from a base model and sentence pairs, or, with --config, one for each of many.

    Three stages: the embedding is tuned, a Kolmogorov-Smirnov test picks the rows that moved (the ticket),
    and these rows alone are tuned again from the base. Each stage continues from its checkpoint after a kill;
    a finished stage is used again by any build in the same folder that needs it.
    """
    if config is not None:
        from ksl_patch.cli.fleet import build_fleet

        build_fleet(context, config, more, force=force, as_json=as_json, ray=ray, ray_cpus=ray_cpus)
        return
    if ray is not None:
        raise click.UsageError("--ray is for the patches of a file: add --config F.")
    if more:
        raise click.UsageError(
            f"there is no option before {more[0]!r}: write --pairs, or --beside, before each of several files."
        )
    output: Path = options.pop("output")
    settings = settings_of(context, options | {"output": output}, given_in(context))
    check_output(output, force)
    run = run or kept_run(output)

    starting(as_json)
    with needing(TRAIN):
        from ksl_patch.train.build import build as build_patch
        from ksl_patch.train.config import BuildConfig
        from ksl_patch.train.loaded import launched
        from ksl_patch.train.progress import JsonReporter, RichReporter, SilentReporter

    state = launched(options["device"])
    leader, ask = state.is_main_process, not yes and state.num_processes == 1  # the others would wait
    reporter = (JsonReporter() if as_json else RichReporter(ask=ask)) if leader else SilentReporter()
    with reporter if isinstance(reporter, RichReporter) else nullcontext():
        patch = build_patch(BuildConfig(**settings), run, reporter)
    if not leader:
        return
    if output.exists() and not force:
        raise click.ClickException(
            f"{output} was written by something else meanwhile: give the same command another -o, and --resume {run}, "
            "where all stages are finished."
        )
    patch.save(output)
    if as_json:
        size = output.stat().st_size
        print(json.dumps({"event": "patch", "path": str(output), "digest": patch.digest, "bytes": size}), flush=True)
    else:
        rows, nbytes = counted(len(patch.token_ids), "row"), output.stat().st_size
        click.echo(f"Wrote {output}: {rows}, {nbytes:,} bytes, digest {patch.digest[:12]}")
        click.echo(f"Checkpoints are in {run}, where eval and certify find the pairs and what was tuned (--run).")
