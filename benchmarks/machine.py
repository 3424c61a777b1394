"""What a benchmark ran on, and where its results go."""

import json
import os
import platform
from pathlib import Path

import numpy
import torch


def machine(device="cpu"):
    """The processor (and GPU), cores, and versions, for the results' file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "numpy": numpy.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.device(device).type == "cuda" else {})


def report(results, output):
    """Print the machine, and write the results to a file where one is named."""
    print(json.dumps(results["machine"]))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
