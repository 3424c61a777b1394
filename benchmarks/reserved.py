"""Reserved rows beside the test's, the most frequent and one row: the study of docs/reserved.md, on Gemma 3 270M.

    make study        or: python benchmarks/reserved.py .demo

One command, which continues after a kill. What is trained and generated stays in FOLDER/study, beside that of study.py;
each part's figures go to benchmarks/results/reserved/, and from there into the tables of docs/reserved.md (`--tables`
writes these alone). A part is made again where its settings changed, or its file is deleted.
"""

import dataclasses
import inspect
import re

import numpy as np
from study import (
    DOMAINS,
    NEW_TOKENS,
    PAIRS,
    ROOT,
    ROWS,
    changed,
    command,
    figures_table,
    keep_part,
    kept_in,
    named,
    not_measured,
    row_name,
    settings,
    whole,
)

from ksl_patch.evidence.evaluate import evaluate
from ksl_patch.evidence.outputs import Cache, Outputs
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.evidence.systems import prompts_of
from ksl_patch.hf import attach
from ksl_patch.overlay import slot_rows
from ksl_patch.patch.evaluation import Difference, Evaluation, Figure, read, write
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.patch.wording import against, difference, from_base, show
from ksl_patch.store.card import markdown_table
from ksl_patch.ticket import given_ticket
from ksl_patch.train.build import Build
from ksl_patch.train.loss import answer_losses, losses_by_token

RESULTS, DOCUMENT = ROOT / "benchmarks/results/reserved", ROOT / "docs/reserved.md"
BUILDS = [("gnome", "de"), ("gnome", "ru"), ("quran", "id")]
FIRST = BUILDS[0]
WANTED = {"start": BUILDS, "main": BUILDS, "tickets": BUILDS, "tokens": BUILDS, "others": [FIRST], "sizes": [FIRST]}
SIZES, SEEDS = (1, 4, ROWS, 64), (0, 1)
SOFT = "reserved rows, no words"
SYSTEMS = {  # of each its selection, and what else is other in its build
    "patch": ("reserved", {}),
    SOFT: ("reserved", {"template": "soft"}),
    "ks": ("ks", {}),
    "frequency": ("frequency", {}),
    row_name("\n"): ("\n", {}),
}
CONSTANTS = {"sizes": SIZES, "seeds": SEEDS, "rows": ROWS, "pairs": PAIRS, "new_tokens": NEW_TOKENS}


def slot_of(handle, patch):
    return 0 if patch is None else handle.bank.add(slot_rows(patch))


class Study:
    """Its parts are computed once and kept by name and by the settings of their build."""

    def __init__(self, folder, reporter):
        self.folder, self.reporter, self.loaded = folder, reporter, None
        self.builds = {}

    def build(self, which, selection="ks", k=ROWS, seed=0, **changes):
        """A build of the study; those of one text share what they train."""
        key = (*which, selection, k, seed, *sorted(changes.items()))
        if key not in self.builds:
            config = dataclasses.replace(
                settings(self.folder, *which), selection=selection, top_k=k, seed=seed, **changes
            )
            made = Build(config, self.folder / "study" / which[0], self.reporter, self.loaded)
            self.builds[key], self.loaded = made, made.loaded
        return self.builds[key]

    def patch(self, which, selection, k=ROWS, seed=0, **changes):
        build = self.build(which, selection if selection in ("reserved", "ks") else "ks", k, seed, **changes)
        if selection == "\n":
            return build.patch_of(given_ticket(("\n",), build.tokenizer, build.base.vocab_size))
        return build.patch_of(build.ticket(selection, k))

    def seeds(self, which, selection, k=ROWS, **changes):
        return {seed: self.patch(which, selection, k, seed, **changes) for seed in SEEDS}

    def once(self, which, part):
        build = self.build(which)
        of = {
            "config": changed(build.config, which),
            "base": build.loaded.digest,
            "examples": build.examples_digest,
            "held_out": build.held_out.digest,
            "constants": CONSTANTS,
        }
        if keep_part(RESULTS, part, which, of, lambda: getattr(self, part)(which)):
            self.reporter.note("part", f"{' '.join(which)}: {part} is done")

    def score(self, which, systems):
        """The evaluation of systems, the first of which is of reserved rows, each in its own prompt."""
        own = self.build(which, "reserved", len(systems["patch"][0].token_ids))
        held_out = own.held_out.first(PAIRS)
        result = evaluate(
            own.model, own.tokenizer, held_out, systems, self.reporter, max_new_tokens=NEW_TOKENS,
            cache=Cache.of(own), part="held-out", source_language="en",
            prompts=prompts_of(systems["patch"][0], systems),
        )  # fmt: skip
        return write(result)

    def main(self, which):
        """Reserved rows with the instruction and without, and what texts have in their place."""
        return self.score(which, {name: self.seeds(which, kind, **more) for name, (kind, more) in SYSTEMS.items()})

    def tickets(self, which):
        """Which rows the test and the counts choose, with p and how often the embedding tuning read their tokens."""
        found = {}
        for seed in SEEDS:
            build = self.build(which, seed=seed)
            ks, frequent = build.ticket("ks", ROWS), build.ticket("frequency", ROWS)
            found[str(seed)] = {
                "ks": ks.token_ids.tolist(),
                "pvalue": ks.pvalue.tolist(),
                "reads": build.embed_counts[ks.token_ids].tolist(),
                "frequency": frequent.token_ids.tolist(),
                "tokens": [build.tokenizer.decode([i]) for i in ks.token_ids.tolist()],
            }
        return found

    def tokens(self, which):
        """Of each answer the loss of its first token, of its end and of those between, and how long the prompts are."""

        def parts(build, examples, patch):
            with attach(build.model) as handle, handle.serving(slot_of(handle, patch)):
                each = losses_by_token(build.model, examples, marking=handle.marking)
            return [[round(x, 4) for x in (one[0], sum(one[1:-1]), one[-1])] for one in each]

        plain = self.build(which).held_out.first(PAIRS)
        systems = {"base": {"0": parts(self.build(which), plain.examples, None)}}
        prompts = {"base": plain}
        for name, (kind, more) in SYSTEMS.items():
            build = self.build(which, kind if kind == "reserved" else "ks", **more)
            prompts[name] = build.held_out.first(PAIRS)
            systems[name] = {
                str(seed): parts(build, prompts[name].examples, patch)
                for seed, patch in self.seeds(which, kind, **more).items()
            }
        return {
            "groups": plain.groups,
            "tokens": [len(each.answer) for each in plain.examples],
            "prompt": {
                name: sum(len(each.prompt) for each in pairs.examples) / len(pairs) for name, pairs in prompts.items()
            },
            "systems": systems,
        }

    def sizes(self, which):
        """The same at several sizes, with the first seed."""
        return {
            str(k): self.score(which, {
                name: {SEEDS[0]: self.patch(which, selection, k, SEEDS[0], **changes)}
                for name, selection, changes in (
                    ("patch", "reserved", {}), (SOFT, "reserved", {"template": "soft"}), ("ks", "ks", {}),
                    ("frequency", "frequency", {}),
                )
                if k > 1 or name != SOFT
            })
            for k in SIZES if k != ROWS
        }  # fmt: skip

    def losses(self, build, patch, held_out):
        """As outputs, of which the losses alone are looked at."""
        with attach(build.model) as handle, handle.serving(slot_of(handle, patch)):
            losses, tokens = answer_losses(build.model, held_out.examples, marking=handle.marking)
        n = len(held_out)
        return Outputs([""] * n, [True] * n, losses, tokens, [[]] * n)

    def start(self, which):
        """Where the training of reserved rows starts: held-out losses, and the interval of their difference."""
        found = {}
        for template in ("plain", "soft"):
            for seed in SEEDS:
                runs = {}
                for start in ("text", "base"):
                    build = self.build(which, "reserved", seed=seed, template=template, start=start)
                    held_out = build.held_out.first(PAIRS)
                    runs[start] = self.losses(build, build.patch_of(build.ticket()), held_out)
                base = self.losses(build, None, build.of_base(held_out))
                scorer = Scorer(held_out.references, groups=held_out.groups)
                figure = scorer.figures([runs["base"]], base, runs["text"])["loss"]
                found[f"{template} {seed}"] = {
                    "base": scorer.of_base(base)["loss"].value,
                    "from text": scorer.of_base(runs["text"])["loss"].value,
                    "from themselves": figure.value,
                    "text minus themselves": dataclasses.asdict(figure.patch_minus),
                }
        return found

    def others(self, which):
        """Other languages' prompts under this language's patches: losses, with the interval of the difference."""
        systems = {
            "reserved rows": self.patch(which, "reserved"), "largest KS distance": self.patch(which, "ks"),
            "most frequent rows": self.patch(which, "frequency"), row_name("\n"): self.patch(which, "\n"),
        }  # fmt: skip
        found = {}
        for other in [("gnome", "ru"), ("gnome", "ko"), ("gnome", "id"), ("quran", "es")]:
            build = self.build(other)
            held_out = build.held_out.first(PAIRS)
            scorer = Scorer(held_out.references, groups=held_out.groups)
            base = self.losses(build, None, held_out)
            found["-".join(other)] = {"base": scorer.of_base(base)["loss"].value} | {
                name: dataclasses.asdict(scorer.figures([self.losses(build, patch, held_out)], base)["loss"])
                for name, patch in systems.items()
            }
        return found

    def make(self):
        for part, wanted in WANTED.items():
            for which in wanted:
                self.once(which, part)


TABLES = {}


def table(function):
    """A part of the document, by the function's name: made of the part of the study that its argument names."""
    TABLES[function.__name__] = function
    return function


START_PROMPTS = {"plain": "before the prompt", "soft": "no words"}
LABELS = {
    "patch": "reserved rows before the prompt", "ks": "largest KS distance", "frequency": "most frequent rows",
}  # fmt: skip


def own_label(evaluation):
    """The evaluation's systems with what each is called here."""
    return [(LABELS.get(each.name, each.label), each) for each in evaluation.ordered]


@table
def main(main):
    parts = []
    for which, value in main.items():
        evaluation = read(Evaluation, value)
        parts.append(f"### {named(which)}\n\n{figures_table(own_label(evaluation))}\n\n{against_table(evaluation)}")
    return "\n\n".join(parts)


def against_table(evaluation):
    """Reserved rows minus each other system, with intervals, and each system's loss with every seed."""
    lines = [
        (
            name,
            *(against(metric, system.figures[metric]) for metric in ("loss", "chrf", "stop_rate")),
            *(of_seeds(metric, system.figures[metric]) for metric in ("loss", "chrf", "in_language")),
        )
        for name, system in own_label(evaluation)
    ]  # fmt: skip
    head = (
        "", "reserved minus it: loss", "chrF++ raw", "stops by itself", "with each seed: loss", "chrF++ raw",
        "in the target language",
    )  # fmt: skip
    return markdown_table(head, lines)


def of_seeds(metric, figure):
    return " / ".join(show(metric, value) for value in figure.per_seed)


@table
def tickets(tickets):
    lines = []
    for which, of in tickets.items():
        first, second = (set(of[str(seed)]["ks"]) for seed in SEEDS)
        for seed in SEEDS:
            one = of[str(seed)]
            lines.append((
                named(which), str(seed), str(sum(p < DEFAULT_ALPHA for p in one["pvalue"])),
                str(len({*one["ks"]} & {*one["frequency"]})), str(len(first & second)),
                str(sum(reads < 10 for reads in one["reads"])),
            ))  # fmt: skip
    head = ("", "seed", f"p < {DEFAULT_ALPHA:g}", f"among the {ROWS} most frequent", "chosen with the other seed too",
            "read less than 10 times")  # fmt: skip
    return markdown_table(head, lines)


def averaged(of, name):
    """A system's losses, averaged over its seeds: [n, 3], and all of an answer as outputs, to be compared."""
    losses = np.mean(list(of["systems"][name].values()), axis=0)
    n = len(losses)
    return losses, Outputs([""] * n, [True] * n, losses.sum(axis=1).tolist(), of["tokens"], [[]] * n)


@table
def tokens(tokens):
    lines = []
    for which, of in tokens.items():
        count, scorer = np.asarray(of["tokens"]), Scorer([""] * len(of["tokens"]), groups=of["groups"])
        _, base = averaged(of, "base")
        _, patch = averaged(of, "patch")
        for name in of["systems"]:
            losses, outputs = averaged(of, name)
            first, between, end = losses.sum(axis=0) / (len(count), (count - 2).sum(), len(count))
            lead = ""
            if name not in ("base", "patch"):
                lead = difference("loss", scorer.figures([outputs], base, patch)["loss"].patch_minus)
            lines.append((
                named(which), LABELS.get(name, name), f"{of['prompt'][name]:.0f}", f"{first:.2f}", f"{between:.2f}",
                f"{end:.2f}", f"{losses.sum() / count.sum():.3f}", lead,
            ))  # fmt: skip
    head = ("", "", "tokens of a prompt", "loss of the first token", "of each between", "of the end", "of all",
            "reserved minus it")  # fmt: skip
    return markdown_table(head, lines)


@table
def other_text(main):
    lines = []
    for which, value in main.items():
        for label, system in own_label(read(Evaluation, value)):
            figures = system.figures
            lines.append((
                named(which), label, show("other_loss", figures["other_loss"].value),
                *(
                    (show("touched", figures["touched"].value), f"{8 * figures['other_same'].value:.0f} of 8")
                    if "touched" in figures else ("", "")
                ),
            ))  # fmt: skip
    head = ("", "", "loss per token of other text", "of 1,000 tokens, changed", "other prompts with the base's answer")
    return markdown_table(head, lines)


@table
def sizes(main, sizes):
    lines = []
    by_size = {str(ROWS): main["-".join(FIRST)], **sizes["-".join(FIRST)]}
    for k in sorted(by_size, key=int):
        evaluation = read(Evaluation, by_size[k])
        for label, system in own_label(evaluation):
            if system.name in ("base", row_name("\n")):
                continue
            figures = system.figures
            lines.append((
                k, label,
                from_base("loss", figures["loss"]),
                from_base("chrf", figures["chrf"]), show("stop_rate", figures["stop_rate"].value),
                against("loss", figures["loss"]),
                from_base("other_loss", figures["other_loss"]),
            ))  # fmt: skip
    head = (
        "rows", "", "loss minus the base's", "chrF++ raw minus the base's", "stops by itself",
        "loss, reserved minus it", "other text's loss minus the base's",
    )  # fmt: skip
    return markdown_table(head, lines)


@table
def start(start):
    lines = [
        (named(which), START_PROMPTS[key.split()[0]], key.split()[1], f"{each['base']:.3f}", f"{each['from text']:.3f}",
         f"{each['from themselves']:.3f}", difference("loss", Difference(**each["text minus themselves"])))
        for which, of in start.items() for key, each in of.items()
    ]  # fmt: skip
    head = (
        "", "reserved rows", "seed", "loss of the base", "from the instruction's rows", "from the reserved rows",
        "the first minus the second",
    )  # fmt: skip
    return markdown_table(head, lines)


@table
def others(others):
    found = others["-".join(FIRST)]
    names = list(next(iter(found.values())))
    lines = [
        (named(which), f"{of['base']:.3f}",
         *(from_base("loss", Figure(**of[name])) for name in names[1:]))
        for which, of in found.items()
    ]  # fmt: skip
    return markdown_table(("the prompt of", *names), lines)


def kept_results():
    """What there is of each part, by part and build."""
    return kept_in(RESULTS, WANTED)


def setting(kept):
    """What everything was measured with, and what is not measured yet."""
    each = [one for of in kept.values() for one in of.values()]
    config, cpu = whole(each[0]["of"]["config"]), each[0]["machine"]
    notes = {
        f"- {named(which)}: {note}"
        for which, one in kept["main"].items()
        for note in read(Evaluation, one["value"]).notes
        if note.startswith(("Intervals", "py3langid"))
    }
    return "\n".join([
        f"{PAIRS} held-out sentences each, seeds {' and '.join(map(str, SEEDS))}; {config['steps']} steps of the "
        f"rows' tuning, for the test {config['embed_steps']} of embedding tuning before, batch {config['batch_size']}, "
        f"learning rates {config['embed_lr']} and {config['lr']} standard deviations of the table; greedy, at most "
        f"{NEW_TOKENS} new tokens. Machine: {cpu['cpu']}, {cpu['cores']} cores. Texts: "
        f"{', '.join(DOMAINS[domain] for domain in dict.fromkeys(domain for domain, _ in BUILDS))}.",
        "", *sorted(notes),
    ]).rstrip() + not_measured(kept, WANTED)  # fmt: skip


def tables(kept):
    """Every part of the document that can be made, by name."""
    parts = {part: {which: one["value"] for which, one in of.items()} for part, of in kept.items()}
    found = {"setting": setting(kept) if any(parts.values()) else "Not measured yet."}
    for name, function in TABLES.items():
        needs = [parts[part] for part in inspect.signature(function).parameters]
        found[name] = function(*needs) if all(needs) else "Not measured yet."
    intervals = sum(len(re.findall(r"[0-9]%? to [-+0-9]", text)) for text in found.values())
    found["setting"] += (
        f"\n\n{intervals} intervals of 95 % stand on this page: about {intervals / 20:.0f} miss by chance."
    )
    return found


if __name__ == "__main__":
    command(Study, DOCUMENT, RESULTS, lambda: tables(kept_results()))()
