"""What a build says of its pairs and settings before it works, and what it doubts of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ksl_patch.data.languages import language_name
from ksl_patch.data.pairs import Pair
from ksl_patch.data.reading import Reading
from ksl_patch.data.recognition import recogniser

if TYPE_CHECKING:
    from ksl_patch.train.material import Material


def report_pairs(of: Material, read: Sequence[Pair], reading: Reading) -> None:
    """Which language is which, the first pairs as they will be trained, and what was left out."""
    config, shown = of.config, read[:5]
    source, target = (f"{language_name(tag)} ({tag})" for tag in (config.source_language, config.language))
    lines = [f"{source} -> {target}, {len(read):,} pairs. The first:"]
    lines += [f"  {_short(pair.source)} -> {_short(pair.target)}" for pair in shown]
    examples = [[pair.source, pair.target] for pair in shown]
    of.reporter.note("pairs", "\n".join(lines), pairs=len(read), examples=examples)
    known = recogniser(config.language, config.source_language)
    sample = [pair.target for pair in read[:: max(1, len(read) // 200)]]
    if known is not None and len(sample) >= 20 and (found := sum(map(known, sample)) / len(sample)) < 0.2:
        message = (
            f"py3langid takes {found:.0%} of the targets for {language_name(config.language)}: is --language right?"
        )
        of.reporter.doubt("language", message, recognised=found, language=config.language)
    if reading.wrong:
        count = "1 line is no pair and was" if reading.wrong == 1 else f"{reading.wrong:,} lines are no pairs and were"
        lines = [f"{count} left out (--strict refuses them):", *reading.first]
        of.reporter.note("wrong_lines", "\n  ".join(lines), lines=reading.wrong, first=reading.first)


def report_start(of: Material) -> None:
    """How many pairs there are of each kind, and the learning rates in the table's own units."""
    config, processes = of.config, of.processes
    embedding, rows = config.trains(config.rule)
    rates = [
        (name, lr) for name, lr, used in (("embedding", config.embed_lr, embedding), ("rows", config.lr, rows)) if used
    ]
    stop = f"{len(of.validation)} to stop by, " if config.auto_steps else ""
    together = f", {processes} processes" if processes > 1 else ""
    lines = [
        f"{len(of.train)} pairs to train, {stop}{len(of.dev)} for choices, {len(of.held_out)} held out{together}",
        f"the prompt: {json.dumps(of.template.text, ensure_ascii=False)}",
        f"learning rate{'s' * (len(rates) > 1)} "
        + " and ".join(f"{lr * of.scale:.3g} ({name}), {lr:g}" for name, lr in rates)
        + f" of the standard deviation of the table's values, {of.scale:.3g}",
    ]
    of.reporter.note(
        "start",
        "\n".join(lines),
        pairs=len(of.train),
        validation=len(of.validation),
        dev=len(of.dev),
        held_out=len(of.held_out),
        processes=processes,
        scale=of.scale,
        embed_lr=config.embed_lr * of.scale if embedding else None,
        lr=config.lr * of.scale if rows else None,
        run=str(of.run),
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"
