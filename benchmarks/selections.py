"""Which selection of rows wins? One embedding tuning, then partial tuning of each selection, on held-out pairs.

    python benchmarks/selections.py --base DIR --pairs es.jsonl --language es --run RUN --rows 18 --rows 64

Prints a JSON line for the base, the tuned embedding, and each selection and size, then a table in Markdown.
"""

import dataclasses
import json
import time
from pathlib import Path

import click
import torch

from ksl_patch.ticket import Ticket
from ksl_patch.train.build import Build, BuildConfig
from ksl_patch.train.evaluate import score, token_loss, translate
from ksl_patch.train.progress import RichReporter


@click.command()
@click.option("--base", required=True)
@click.option("--pairs", required=True)
@click.option("--language", required=True)
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--rows", "sizes", type=int, multiple=True, default=(18,))
@click.option("--selection", "selections", multiple=True, default=("ks", "frequency", "l2", "random"))
@click.option("--embed-steps", default=60)
@click.option("--embed-lr", default=0.1)
@click.option("--steps", default=60)
@click.option("--lr", default=0.15)
@click.option("--batch-size", default=8)
@click.option("--seed", default=0)
@click.option("--held-out", default=64)
@click.option("--generate", "generated", default=0, help="Held-out prompts to translate.")
@click.option("--template", default="plain")
@click.option("--mode", type=click.Choice(["partial", "transfer"]), default="partial")
@click.option("--side", type=click.Choice(["input", "input+output"]), default="input")
def main(run, sizes, selections, generated, **settings):
    torch.set_num_threads(2)
    config = BuildConfig(name="experiment", alpha=None, top_k=1, **settings)
    rows = []

    def report(what, k, loss, patch, **extra):
        row = {"what": what, "rows": k, "loss": round(loss, 4), **extra}
        if generated:
            outputs = translate(build.model, build.tokenizer, build.held_out[:generated], patch, max_new_tokens=80)
            figures = score(outputs, [pair.target for pair in build.pairs.held_out[:generated]]).as_dict()
            row |= {name: round(value, 2) for name, value in figures.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)

    with RichReporter() as reporter:
        build = Build(config, run, reporter)
        report("base", 0, token_loss(build.model, build.held_out), None)
        start = time.perf_counter()
        ids, tuned = build.embedding()
        result = build.ks()
        whole = Ticket(ids.numpy(), "ks")
        report(
            "tuned embedding", len(ids), build.rows_loss(ids, tuned), build.patch_from(whole, tuned),
            significant={alpha: int((result.pvalue < alpha).sum()) for alpha in (0.05, 0.01)},
            largest_statistic=round(float(result.statistic.max()), 4),
            seconds=round(time.perf_counter() - start),
        )  # fmt: skip
        for k in sizes:
            for selection in selections:
                ticket = build.ticket(selection, k)
                patch = build.patch_from(ticket, build.rows(ticket))
                largest_first = result.statistic[ticket.token_ids].argsort()[::-1]
                tokens = [build.tokenizer.decode([i]) for i in ticket.token_ids[largest_first][:18]]
                report(selection, k, build.patched_loss(patch), patch, tokens=tokens)
    print(json.dumps({"config": dataclasses.asdict(config)}))


if __name__ == "__main__":
    main()
