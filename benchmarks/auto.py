"""`--steps auto` beside steps and a rate that were set by hand, on Gemma 3 270M: 18 frequent rows, four builds.

    python benchmarks/auto.py .demo

The best run by hand is chosen by the very loss that is compared, which auto never sees, and trains on the validation
pairs too: the comparison favours it. Killed, it continues; results go to benchmarks/results/auto/, and from there into
the tables of docs/cli.md (`--tables` writes these alone).
"""

import dataclasses

import numpy as np
from reserved import slot_of
from study import ROOT, changed, command, keep_part, kept_in, named, not_measured, settings

from ksl_patch.cli.settings import MOST_STEPS
from ksl_patch.evidence.outputs import Outputs
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.hf import attach
from ksl_patch.patch.wording import difference
from ksl_patch.store.card import markdown_table
from ksl_patch.train.build import Build
from ksl_patch.train.loss import answer_losses

RESULTS, DOCUMENT = ROOT / "benchmarks/results/auto", ROOT / "docs/cli.md"
BUILDS = [("gnome", "de"), ("quran", "id"), ("gnome", "ko"), ("quran", "ru")]
WANTED = {"runs": BUILDS, "rates": BUILDS[:1]}
STEPS, RATES, PAIRS = 100, (0.05, 0.15, 0.45), 96
OWN_RATE = 0.15  # the usual one, which auto has


class Study:
    """Its parts are computed once and kept by the settings of their builds."""

    def __init__(self, folder, reporter):
        self.folder, self.reporter, self.loaded = folder, reporter, None

    def build(self, which, lr, *, auto):
        config = dataclasses.replace(
            settings(self.folder, *which), selection="frequency", dev=64, lr=lr, auto_steps=auto,
            steps=MOST_STEPS if auto else STEPS,
        )  # fmt: skip
        build = Build(config, self.folder / "auto" / which[0], self.reporter, self.loaded)
        self.loaded = build.loaded
        return build

    def run(self, which, lr, *, auto):
        """A run's losses on held-out sentences, the steps that were trained and are kept, and the base's losses."""
        build = self.build(which, lr, auto=auto)
        ticket = build.ticket()
        patch, held_out = build.patch_of(ticket), build.held_out.first(PAIRS)
        kept, trained = build.steps_of(ticket)
        losses, tokens = self.losses(build, patch, held_out)
        return {
            "lr": lr, "kept": kept, "trained": trained, "rows": ticket.token_ids.tolist(), "losses": losses,
            "tokens": tokens, "base": self.losses(build, None, held_out)[0], "groups": held_out.groups,
            "pairs": len(build.train), "validation_groups": len(set(build.validation.groups or ())),
        }  # fmt: skip

    def losses(self, build, patch, held_out):
        with attach(build.model) as handle, handle.serving(slot_of(handle, patch)):
            return answer_losses(build.model, held_out.examples, marking=handle.marking)

    def runs(self, which):
        """One of auto, and those by hand."""
        return {
            "auto": self.run(which, OWN_RATE, auto=True), "by hand": [self.run(which, lr, auto=False) for lr in RATES],
        }  # fmt: skip

    def rates(self, which):
        """Auto at every rate."""
        return [self.run(which, lr, auto=True) for lr in RATES]

    def make(self):
        for part, wanted in WANTED.items():
            for which in wanted:
                auto = self.build(which, OWN_RATE, auto=True)
                of = {
                    "config": changed(auto.config, which),
                    "base": auto.loaded.digest,
                    "examples": [auto.examples_digest, self.build(which, OWN_RATE, auto=False).examples_digest],
                    "held_out": auto.held_out.digest,
                    "stops_by": auto._stops_by(auto.ticket()).key(),
                    "constants": [STEPS, RATES, PAIRS],
                }
                keep_part(RESULTS, part, which, of, lambda w=which, p=part: getattr(self, p)(w))


def outputs(run, system="losses"):
    n = len(run["tokens"])
    return Outputs([""] * n, [True] * n, run[system], run["tokens"], [[]] * n)


def loss(run, system="losses"):
    return float(np.sum(run[system]) / np.sum(run["tokens"]))


def runs_table(runs):
    lines = []
    for which, of in runs.items():
        auto, hand = of["auto"], of["by hand"]
        best = min(hand, key=loss)
        scorer = Scorer([""] * len(auto["losses"]), groups=auto["groups"])
        figure = scorer.figures([outputs(best)], outputs(auto, "base"), outputs(auto))["loss"]
        lines.append((
            named(which), f"{len(set(auto['groups']))}", f"{loss(auto, 'base'):.3f}", f"{loss(auto):.3f}",
            f"{auto['kept']} of {auto['trained']}",
            *(f"**{loss(each):.3f}**" if each is best else f"{loss(each):.3f}" for each in hand),
            difference("loss", figure.patch_minus), f"{len({*auto['rows']} & {*best['rows']})} of {len(best['rows'])}",
        ))  # fmt: skip
    head = (
        "", "documents", "base", "auto", "its steps, kept and trained", *(f"{STEPS} steps at {rate}" for rate in RATES),
        "auto minus the best of these", "the same rows",
    )  # fmt: skip
    return markdown_table(head, lines)


def rates_table(rates):
    lines = [
        (named(which), f"{each['lr']}", f"{loss(each):.3f}", f"{each['kept']} of {each['trained']}")
        for which, of in rates.items() for each in of
    ]  # fmt: skip
    return markdown_table(("", "rate", "auto", "its steps, kept and trained"), lines)


def tables(kept):
    """The document's parts, by name."""
    parts = {part: {which: one["value"] for which, one in of.items()} for part, of in kept.items()}
    found = {
        "auto_runs": runs_table(parts["runs"]) if parts["runs"] else "Not measured yet.",
        "auto_rates": rates_table(parts["rates"]) if parts["rates"] else "Not measured yet.",
    }
    return found | {"auto_runs": found["auto_runs"] + not_measured(kept, WANTED)}


if __name__ == "__main__":
    command(Study, DOCUMENT, RESULTS, lambda: tables(kept_in(RESULTS, WANTED)))()
