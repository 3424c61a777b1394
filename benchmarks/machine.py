"""What benchmarks share: what they ran on, how rounds are compared, and where results go."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from rich.console import Console
from rich.table import Table

console = Console(width=120)


def machine(device="cpu"):
    """The processor (and GPU), cores, and versions, for the results' file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "numpy": np.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.device(device).type == "cuda" else {})


def paired(base, other):
    """The median of the rounds' own ratios, base / other, and its 95 % bootstrap interval: machines drift."""
    ratios = np.array(base) / np.array(other)
    if np.ptp(ratios) == 0:  # of one with itself, or of one round
        return float(ratios[0]), [float(ratios[0])] * 2
    interval = scipy.stats.bootstrap((ratios,), np.median, confidence_level=0.95, rng=0).confidence_interval
    return float(np.median(ratios)), list(map(float, interval))


def show(title, columns, rows):
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[-1] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def report(results, output):
    """Print the machine, and write the results to a file where one is named."""
    print(json.dumps(results["machine"]))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
