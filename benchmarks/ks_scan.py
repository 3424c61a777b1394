"""Rows per second of the KS test over tables, beside scipy and beside sorting alone, in one run.

    python benchmarks/ks_scan.py [--base .demo/gemma3 --tuned .demo/run] [--output benchmarks/results/ks_scan.json]

Every row changed: the worst case. Tuned table: the base's, and the one that an embedding tuning of `make demo` gave.
Contenders take turns; medians are printed.
"""

import statistics
import time
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import scipy
import torch
from machine import machine, report
from rich.console import Console
from rich.table import Table
from scipy.stats import ks_2samp

from ksl_patch import ks_test


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rates(before, after, rounds, scipy_rows=64):
    """Median rows per second of each contender; scipy on a sample, since it takes one row at a time."""
    V = len(before)
    step = max(1, V // scipy_rows)
    x, y = before.double().numpy()[::step], after.double().numpy()[::step]
    sortable = [t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in (before, after)]

    def with_scipy():
        for a, b in zip(x, y, strict=True):
            ks_2samp(a, b, method="exact")

    contenders = {
        "ks_test": (lambda: ks_test(before, after), V),
        "scipy.stats.ks_2samp": (with_scipy, len(x)),
        "sorting both, 1 thread": (lambda: [np.sort(table, axis=1) for table in sortable], V),
    }
    times = {name: [] for name in contenders}
    ks_test(before, after)  # compile, and fill the table of p-values
    for _ in range(rounds):
        for name, (function, rows) in contenders.items():
            times[name].append(rows / seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def cases(base, tuned):
    g = torch.Generator().manual_seed(0)
    for d, V in ((576, 16384), (4096, 2048)):
        for dtype in (torch.float32, torch.bfloat16):
            before = torch.randn(V, d, generator=g)
            after = before + torch.randn(V, d, generator=g)
            yield f"every row changed, d={d}, {str(dtype)[6:]}", before.to(dtype), after.to(dtype)
    if tuned:
        before = safetensors.torch.load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
        rows = safetensors.torch.load_file(next(tuned.glob("embed-*/rows.safetensors")))
        after = before.clone()
        after[rows["token_ids"]] = rows["rows"]
        for dtype in (torch.float32, torch.bfloat16):
            yield f"tuned table {list(before.shape)}, {str(dtype)[6:]}", before.to(dtype), after.to(dtype)


@click.command()
@click.option("--rounds", default=5)
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base that was tuned.")
@click.option("--tuned", type=click.Path(path_type=Path), help="Run folder of a build with that base.")
@click.option("--output", type=click.Path(path_type=Path))
def main(rounds, base, tuned, output):
    results = {
        "machine": machine(),
        "scipy": scipy.__version__,
        "unit": "rows per second, median",
        "rounds": rounds,
        "cases": {},
    }
    table = Table("case", "x scipy", "x sorting", "ks_test rows/s", "scipy rows/s", "sorting rows/s")
    for name, before, after in cases(base, tuned):
        r = rates(before, after, rounds)
        ours, per_row, sorting = r.values()
        results["cases"][name] = r
        table.add_row(name, f"{ours / per_row:.0f}", f"{ours / sorting:.2f}", *(f"{v:,.0f}" for v in r.values()))
    Console(width=140).print(table)
    report(results, output)


if __name__ == "__main__":
    main()
