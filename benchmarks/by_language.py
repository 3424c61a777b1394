"""What it costs to choose a patch by language: one request's choice in `serve --by-language`, in microseconds.

    .venv-vllm/bin/python benchmarks/by_language.py --output benchmarks/results/by-language.json

Real requests' headers and bodies go through the server's own code, over vLLM's table of what is served; no engine runs.
"""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
from machine import machine, report, show
from vllm.lora.request import LoRARequest

from ksl_patch.vllm.languages import Languages
from ksl_patch.vllm.served import Patches
from ksl_patch.vllm.settings import Settings

TAGS = ("es", "pt-BR", "zh-Hant", "sw", "de", "fr", "id", "ja", "ko", "uk", "es-MX", "de-CH", "fr-CA", "no", "fil")
ASKED = ("pt-PT", "es-AR, es;q=0.9, en;q=0.5", "zh-TW", "gsw, de;q=0.5", "nb", "xh, zu;q=0.3")


class Served(Patches):
    """The table of a server with so many patches, of which no file is read."""

    def __init__(self, count):
        self.settings = Settings(by_language=True)
        requests = {f"p{i}": LoRARequest(f"p{i}", i + 1, f"/{i}") for i in range(count)}
        self._models = SimpleNamespace(lora_requests=requests, is_base_model="base".__eq__)

    def names(self):
        return list(self._models.lora_requests)

    def language(self, name):
        return TAGS[int(name[1:]) % len(TAGS)]

    def digest(self, name):
        return "0" * 64


def microseconds(run, repeats):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - began))
    return {"median": float(np.median(times)), "p99": float(np.quantile(times, 0.99))}


@click.command()
@click.option("--counts", multiple=True, type=int, default=(1, 10, 100, 1000))
@click.option("--repeats", default=5000)
@click.option("--output", type=click.Path(path_type=Path))
def main(counts, repeats, output):
    results, lines = {"machine": machine(), "repeats": repeats, "counts": {}}, []
    for count in counts:
        languages, asked = Languages(Served(count)), itertools.cycle(ASKED)

        def by_header(languages=languages, asked=asked):
            languages.choose([(b"accept-language", next(asked).encode())], {"model": "base"})

        def silent(languages=languages):
            languages.choose([(b"accept", b"*/*")], {"model": "base"})

        first = microseconds(by_header, 1)["median"]
        each = {"says a language": microseconds(by_header, repeats), "says none": microseconds(silent, repeats)}
        results["counts"][count] = each | {"first": first}
        said, none = each["says a language"], each["says none"]
        lines.append((
            f"{said['median']:.1f}", f"{said['p99']:.1f}", f"{none['median']:.1f}", f"{first:,.0f}", f"{count} patches",
        ))  # fmt: skip
    show("microseconds a request", ("says a language", "p99", "says none", "the first after a change", ""), lines)
    report(results, output)


if __name__ == "__main__":
    main()
