"""`--steps auto` beside steps and a rate that were set by hand, on Gemma 3 270M: 18 frequent rows, four builds.

    python benchmarks/auto.py .demo

The runs by hand have the same pairs, the 64 of validation too, and the best of them is chosen by the very loss that is
compared, which auto never sees: the comparison favours them. Killed, it continues; results go to
benchmarks/results/auto/, and from there into the tables of docs/cli.md (`--tables` writes these alone).
"""

import dataclasses
from pathlib import Path

import click
import numpy as np
from study import ROOT, changed, keep_part, kept_in, make, named, settings, write_tables

from ksl_patch.evidence.outputs import Outputs
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.hf import attach
from ksl_patch.overlay import slot_rows
from ksl_patch.patch.wording import difference
from ksl_patch.store.card import markdown_table
from ksl_patch.train.build import Build
from ksl_patch.train.loss import answer_losses

RESULTS, DOCUMENT = ROOT / "benchmarks/results/auto", ROOT / "docs/cli.md"
BUILDS = [("gnome", "de"), ("quran", "id"), ("gnome", "ko"), ("quran", "ru")]
WANTED = {"runs": BUILDS, "rates": BUILDS[:1]}
STEPS, RATES, PAIRS = 100, (0.05, 0.15, 0.45), 96


class Study:
    """Its parts are computed once and kept by the settings of their build."""

    def __init__(self, folder, reporter):
        self.folder, self.reporter, self.loaded = folder, reporter, None

    def run(self, which, lr, **changes):
        """A run's losses on held-out sentences, and the steps that were trained and are kept."""
        config = dataclasses.replace(
            settings(self.folder, *which), selection="frequency", dev=64, steps=STEPS, lr=lr, **changes
        )
        build = Build(config, self.folder / "auto" / which[0], self.reporter, self.loaded)
        self.loaded = build.loaded
        ticket = build.ticket()
        patch, held_out = build.patch_of(ticket), build.held_out.first(PAIRS)
        kept, trained = build.steps_of(ticket)
        losses, tokens = self.losses(build, patch, held_out)
        return {"lr": lr, "kept": kept, "trained": trained, "losses": losses, "tokens": tokens,
                "base": self.losses(build, None, held_out)[0], "groups": held_out.groups}  # fmt: skip

    def losses(self, build, patch, held_out):
        with attach(build.model) as handle, handle.serving(handle.bank.add(slot_rows(patch)) if patch else 0):
            return answer_losses(build.model, held_out.examples, marking=handle.marking)

    def auto(self, which, lr=0.15):
        return self.run(which, lr, auto_steps=True) | {"cap": 1000}

    def runs(self, which):
        """One of auto, and those by hand."""
        return {"auto": self.auto(which), "by hand": [self.run(which, lr) for lr in RATES]}

    def rates(self, which):
        """Auto at the other rates."""
        return [self.auto(which, lr) for lr in RATES]

    def make(self):
        for part, wanted in WANTED.items():
            for which in wanted:
                of = {"config": changed(settings(self.folder, *which), which), "constants": [STEPS, RATES, PAIRS]}
                keep_part(RESULTS, part, which, of, lambda w=which, p=part: getattr(self, p)(w))


def outputs(run, system="losses"):
    n = len(run["tokens"])
    return Outputs([""] * n, [True] * n, run[system], run["tokens"], [[]] * n)


def loss(run, system="losses"):
    return float(np.sum(run[system]) / np.sum(run["tokens"]))


def tables(kept):
    """The document's parts, by name."""
    runs = {which: one["value"] for which, one in kept["runs"].items()}
    rates = {which: one["value"] for which, one in kept["rates"].items()}
    lines = []
    for which, of in runs.items():
        auto, hand = of["auto"], of["by hand"]
        best = min(hand, key=loss)
        scorer = Scorer([""] * len(auto["losses"]), groups=auto["groups"])
        figure = scorer.figures([outputs(best)], outputs(auto, "base"), outputs(auto))["loss"]
        lines.append((
            named(which), f"{loss(auto, 'base'):.3f}", f"{loss(auto):.3f}", f"{auto['kept']} of {auto['trained']}",
            *(f"**{loss(each):.3f}**" if each is best else f"{loss(each):.3f}" for each in hand),
            difference("loss", figure.patch_minus),
        ))  # fmt: skip
    head = ("", "base", "auto", "its steps, kept and trained", *(f"{STEPS} steps at {rate}" for rate in RATES),
            "auto minus the best of these")  # fmt: skip
    found = {"auto": markdown_table(head, lines) if lines else "Not measured yet."}
    lines = [
        (named(which), f"{each['lr']}", f"{loss(each):.3f}", f"{each['kept']} of {each['trained']}")
        for which, of in rates.items() for each in of
    ]  # fmt: skip
    found["rates"] = (
        markdown_table(("", "rate", "auto", "its steps, kept and trained"), lines) if lines else "Not measured yet."
    )
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".demo")
@click.option("--tables", "only_tables", is_flag=True, help="Write the tables of the kept results only.")
def run_study(folder: Path, only_tables: bool) -> None:
    if not only_tables:
        make(Study, folder, RESULTS)
    write_tables(DOCUMENT, RESULTS, tables(kept_in(RESULTS, WANTED)))


if __name__ == "__main__":
    run_study()
