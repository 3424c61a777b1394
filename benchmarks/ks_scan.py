"""Rows per second of the KS test over tables, beside scipy and beside sorting alone, in one run.

    python benchmarks/ks_scan.py [--rounds 5] [--tuned RUN/embed-...] [--output benchmarks/results/ks_scan.json]

Every row changed: the worst case. Tuned table: SmolLM2's shape and the share of rows that a real embedding
tuning changed (4,960 of 49,152 in `make demo`'s Spanish run). Contenders are interleaved; medians are printed.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import click
import numpy as np
import scipy
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import ks_2samp

from ksl_patch import ks_test


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), **versions}


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


def cases():
    g = torch.Generator().manual_seed(0)
    for d, V in ((576, 16384), (4096, 2048)):
        for dtype in (torch.float32, torch.bfloat16):
            before = torch.randn(V, d, generator=g)
            after = before + torch.randn(V, d, generator=g)
            yield f"every row changed, d={d}, {str(dtype)[6:]}", before.to(dtype), after.to(dtype)
    before = torch.randn(49152, 576, generator=g) * 0.136
    changed = torch.randperm(49152, generator=g)[:4960]
    after = before.clone()
    after[changed] += 0.05 * torch.randn(4960, 576, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"tuned table 49152 x 576, 10% changed, {str(dtype)[6:]}", before.to(dtype), after.to(dtype)


@click.command()
@click.option("--rounds", default=5)
@click.option("--output", type=click.Path(path_type=Path))
def main(rounds, output):
    results = {"machine": machine(), "unit": "rows per second, median", "rounds": rounds, "cases": {}}
    table = Table("case", "x scipy", "x sorting", "ks_test rows/s", "scipy rows/s", "sorting rows/s")
    for name, before, after in cases():
        r = rates(before, after, rounds)
        ours, per_row, sorting = r.values()
        results["cases"][name] = r
        table.add_row(name, f"{ours / per_row:.0f}", f"{ours / sorting:.2f}", *(f"{v:,.0f}" for v in r.values()))
    Console(width=140).print(table)
    print(json.dumps(results["machine"]))
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
