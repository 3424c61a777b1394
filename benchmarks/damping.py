"""What damping rare rows does to a ticket: embedding tuning with and without it, at two learning rates, on one base.

    python examples/demo/fetch_gemma.py .demo
    python benchmarks/damping.py --base .demo/gemma3 --pairs .demo/gnome-en-de.jsonl --group page

Every build is measured on its dev pairs, which nothing else is. Results go to benchmarks/results/damping.json, and with
`python benchmarks/study.py --tables` into docs/experiments.md. Killed, it continues.
"""

import dataclasses
import json
from pathlib import Path

import click
import numpy as np
from machine import console, machine

from ksl_patch.atomic import write_atomically
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import RichReporter

RESULTS = Path(__file__).parent / "results/damping.json"
ROWS, STEPS, RATES = 18, 60, (0.15, 0.05)


def measured(build: Build) -> dict:
    """A build's ticket of ROWS rows, the tuned embedding that it is from, and the patch of it."""
    result, ticket = build.ks(), build.ticket()
    counts = build.embed_counts[ticket.token_ids]
    frequent = build.ticket("frequency", ROWS).token_ids
    largest = ticket.token_ids[np.argsort(-ticket.statistic, kind="stable")]
    return {
        "damp_rare": build.config.damp_rare,
        "rate": build.config.embed_lr,
        "significant": int((result.pvalue < 0.05).sum()),
        "largest": float(result.statistic.max()),
        "frequent": int(np.isin(ticket.token_ids, frequent).sum()),
        "count": float(np.median(counts)),
        "embedding": build.patched_loss(build.embedding_patch()),
        "patch": build.patched_loss(build.patch_of(ticket)),
        "tokens": [build.tokenizer.decode([i]) for i in largest],
    }


@click.command()
@click.option("--base", required=True)
@click.option("--pairs", required=True)
@click.option("--language", default="de")
@click.option("--group")
@click.option("--run", type=click.Path(path_type=Path), default=Path(".demo/damping"))
def main(base: str, pairs: str, language: str, group: str | None, run: Path) -> None:
    loaded, found = None, []
    config = BuildConfig(
        base=base, pairs=pairs, language=language, name=language, group=group, alpha=None, top_k=ROWS,
        embed_steps=STEPS, steps=STEPS,
    )  # fmt: skip
    with RichReporter(console) as reporter:
        for damp_rare in (True, False):
            for rate in RATES:
                each = dataclasses.replace(config, damp_rare=damp_rare, embed_lr=rate)
                build = Build(each, run, reporter, loaded)
                loaded = build.loaded
                found.append(measured(build))
        frequency = build.patched_loss(build.patch_of(build.ticket("frequency", ROWS)))
    results = {
        "machine": machine(),
        "config": dataclasses.asdict(config) | {"base": Path(base).name, "pairs": Path(pairs).name},
        "dev_pairs": len(build.dev),
        "base": token_loss(build.model, build.dev.examples),
        "frequency": frequency,
        "builds": found,
    }
    write_atomically(RESULTS, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    console.print(f"Wrote {RESULTS}.")


if __name__ == "__main__":
    main()
