"""The whole study of docs/experiments.md on Gemma 3 270M: one command, continues after a kill.

    make study        or: python benchmarks/study.py .demo

What is trained and generated stays in FOLDER/study. Each part's figures go to benchmarks/results/study/, one file for a
part and a build, and from there into the tables of docs/experiments.md (`--tables` writes these alone). A part is made
again where its settings changed, or its file is deleted.
"""

import dataclasses
import hashlib
import inspect
import json
import re
from pathlib import Path

import click
import numpy as np
import scipy.stats
from machine import console, machine

from ksl_patch.atomic import write_atomically
from ksl_patch.data.columns import Columns
from ksl_patch.data.encoding import Example
from ksl_patch.data.languages import language_name
from ksl_patch.data.reading import read_pairs
from ksl_patch.evidence.ablate import PLACES, run_at
from ksl_patch.evidence.agreement import certify
from ksl_patch.evidence.certificate import at_least
from ksl_patch.evidence.evaluate import evaluate
from ksl_patch.evidence.outputs import Cache, outputs_of
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.evidence.systems import make_systems
from ksl_patch.hf import attach
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.evaluation import METRICS, Certificate, Evaluation, SystemScores, read, write
from ksl_patch.patch.wording import against, difference, occurrence_table, with_interval
from ksl_patch.store.card import markdown_table
from ksl_patch.ticket import Ticket, given_ticket
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import answer_losses
from ksl_patch.train.progress import RichReporter
from ksl_patch.train.ticket_checks import template_tokens

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/study", ROOT / "docs/experiments.md"
DAMPING = ROOT / "benchmarks/results/damping.json"
# Builds: a domain and a language. The first has what is measured on one alone, FEW what is measured on two.
HELP, VERSES = [("gnome", language) for language in ("de", "ru", "ko", "id")], [("quran", "ru"), ("quran", "id")]
FIRST, FEW = HELP[0], (HELP[0], HELP[2])
DOMAINS = {"gnome": "GNOME's help", "quran": "the Quran's verses", "udhr": "the Declaration's articles"}
WANTED = {
    "main": HELP, "ticket": [*HELP, *VERSES], "harm": [FIRST], "places": [FIRST], "templates": [FIRST],
    "sizes": [FIRST], "elsewhere": [*HELP, *VERSES], "verses": VERSES, "transfer": HELP, "certificates": FEW,
    "power": [FIRST], "seeds": FEW, "single": [FIRST],
}  # fmt: skip
ROWS, SIZES, SEEDS = 18, (1, 4, 64), 2
PAIRS, NEW_TOKENS = 48, 60
ONE_ROW = ("\n", "<bos>", ":")
ARTICLES = 8  # of the Declaration in one text
OTHER_RATE = 0.05  # of the embedding tuning, for the power of the test
ALPHAS = (0.2, 0.1, 0.05, 0.01, 0.001)
CONSTANTS = {
    "rows": ROWS, "sizes": SIZES, "seeds": SEEDS, "pairs": PAIRS, "new_tokens": NEW_TOKENS, "one_row": ONE_ROW,
    "other_rate": OTHER_RATE, "alphas": ALPHAS, "places": PLACES,
}  # fmt: skip
CONTROLS = ("frequency", "l2", "random", "noise")  # reserved rows have a study of their own: reserved.py
COLUMNS = ("loss", "chrf", "chrf_first_line", "bleu_first_line", "in_language", "stop_rate", "characters")


def settings(folder: Path, domain: str, language: str) -> BuildConfig:
    return BuildConfig(
        base=str(folder / "gemma3"),
        pairs=str(folder / domain / f"en-{language}.jsonl"),
        group="page",
        language=language,
        name=f"gemma3-en-{language}",
        alpha=None,
        top_k=ROWS,
        embed_steps=30,
        steps=40,
        dev=32,
        held_out=192,  # whole pages, of which PAIRS sentences are measured
    )


def row_name(token: str) -> str:
    return f"the row `{json.dumps(token)}` alone"


class Study:
    """Its parts are computed once and kept by name and by the settings of their build."""

    def __init__(self, folder: Path, reporter: RichReporter) -> None:
        self.folder, self.reporter = folder, reporter
        self.run = folder / "study"
        self.builds, self.patches = {}, {}
        # A part may be measured on the texts of other builds.
        files = [file for domain in DOMAINS for file in sorted((folder / domain).glob("en-*.jsonl"))]
        self.texts = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        loaded = None
        for which in (*HELP, *VERSES):
            build = self.builds[which] = Build(settings(folder, *which), self.run / which[0], reporter, loaded)
            loaded = build.loaded

    def once(self, which, part):
        build = self.builds[which]
        of = {
            "config": changed(build.config, which),
            "base": build.loaded.digest,
            "examples": build.examples_digest,
            "held_out": build.held_out.digest,
            "texts": self.texts,
            "constants": CONSTANTS,
        }
        if keep_part(RESULTS, part, which, of, lambda: getattr(self, part)(build, self.patch(which))):
            self.reporter.note("part", f"{' '.join(which)}: {part} is done")

    def patch(self, which):
        if which not in self.patches:
            self.patches[which] = self.builds[which].patch()
        return self.patches[which]

    def score(self, build, systems, held_out=None, part="held-out"):
        held_out = held_out or build.held_out.first(PAIRS)
        result = evaluate(
            build.model, build.tokenizer, held_out, systems, self.reporter,
            max_new_tokens=NEW_TOKENS, cache=Cache.of(build), part=part,
            source_language="en",
        )  # fmt: skip
        return write(result)

    def by_hand(self, build, token):
        """The patch of one row."""
        return build.patch_of(given_ticket((token,), build.tokenizer, build.base.vocab_size))

    def main(self, build, patch):
        """The patch, the tuned embedding, the controls, and rows alone."""
        alone = {row_name(token): {0: self.by_hand(build, token)} for token in ONE_ROW}
        return self.score(build, make_systems(patch, build, CONTROLS) | alone)

    def verses(self, build, patch):
        """The same on the harder domain, with fewer controls."""
        alone = {row_name("\n"): {0: self.by_hand(build, "\n")}}
        return self.score(build, make_systems(patch, build, ("frequency",)) | alone)

    def seeds(self, build, patch):
        """Several training seeds."""
        return self.score(build, make_systems(patch, build, ("frequency", "random"), SEEDS))

    def sizes(self, build, patch):
        """Rows that are significant at each alpha, and what tickets of other sizes do."""
        pvalue = build.ks().pvalue
        systems = {str(k): {0: build.patch_of(build.ticket("ks", k))} for k in SIZES}
        return {
            "significant": {str(alpha): int((pvalue < alpha).sum()) for alpha in ALPHAS},
            "evaluation": self.score(build, {"patch": {0: patch}} | systems),
        }

    def single(self, build, patch):
        """The dev loss of each row of the template alone, beside the base's and the patch's."""
        measured = build.losses(patch)
        rows = [
            {
                "token": build.tokenizer.decode([i]),
                "loss": build.patched_loss(build.patch_of(Ticket(np.array([i]), "single"))),
            }
            for i in template_tokens(build)
        ]
        return {"base": measured["loss_base"], "patch": measured["loss_patch"], "rows": rows}

    def ticket(self, build, patch):
        """How the ticket and the frequencies of its tokens hang together."""
        result, counts = build.ks(), build.embed_counts
        seen = np.flatnonzero(counts)
        top = {k: build.ticket("ks", k).token_ids for k in sorted((*SIZES, ROWS))}
        frequent = {k: build.ticket("frequency", k).token_ids for k in top}
        largest = top[ROWS][np.argsort(-result.statistic[top[ROWS]], kind="stable")]
        return {
            "seen": len(seen),
            "largest": float(result.statistic.max()),
            "significant": int((result.pvalue < 0.05).sum()),
            "spearman": float(scipy.stats.spearmanr(result.statistic[seen], counts[seen]).statistic),
            "frequent": {str(k): int(np.isin(top[k], frequent[k]).sum()) for k in top},
            "top": top[ROWS].tolist(),
            "most_frequent": frequent[ROWS].tolist(),
            "tokens": [build.tokenizer.decode([i]) for i in largest],
        }

    def places(self, build, patch):
        """The same rows, acting at one place alone."""
        held_out = build.held_out.first(PAIRS)
        scorer = Scorer(held_out.references, language=build.config.language, groups=held_out.groups)
        base = outputs_of(
            build.model, build.tokenizer, held_out, None, max_new_tokens=NEW_TOKENS, cache=Cache.of(build)
        )
        systems = [SystemScores(name="base", rows=[0], seeds=[], figures=scorer.of_base(base))]
        for place in PLACES:
            outputs = run_at(build.model, build.tokenizer, held_out, patch, place, max_new_tokens=NEW_TOKENS)
            figures = scorer.figures([outputs], base)
            systems.append(SystemScores(name=place, rows=[len(patch.token_ids)], seeds=[0], figures=figures))
        return [dataclasses.asdict(system) for system in systems]

    def templates(self, build, patch):
        """The patch under other prompts than the one it was trained with, each beside the base under that prompt."""
        source, target = "English", language_name(build.config.language)
        others = {
            "the trained one": build.template,
            "a paraphrase": TemplateMeta(
                text=f"Please render the following {source} text in {target}.\n{source}: {{source}}\n{target}:",
                chat=False,
            ),
            "no instruction": TemplateMeta(text=f"{source}: {{source}}\n{target}:", chat=False),
            "one line": TemplateMeta(text=f'The {target} for "{{source}}" is:', chat=False),
        }
        pairs = build.held_out.first(PAIRS).pairs
        return {
            name: self.score(build, {"patch": {0: patch}}, build.encode(pairs, "held-out", template))
            for name, template in others.items()
        }

    def transfer(self, build, patch):
        """The ticket's rows taken from the tuned embedding instead of tuned alone."""
        transferred = self.transferred(build)
        return self.score(build, {"patch": {0: transferred.patch_of(transferred.ticket())}})

    def power(self, build, patch):
        """What the test sees after an embedding tuning at another learning rate."""
        config = dataclasses.replace(build.config, embed_lr=OTHER_RATE)
        found, held_out = {}, build.held_out.first(PAIRS)
        for each in (Build(config, build.run, self.reporter, build.loaded), build):
            result = each.ks()
            found[f"{each.config.embed_lr:g}"] = {
                "loss": each.patched_loss(each.embedding_patch(), held_out),
                "significant": {str(alpha): int((result.pvalue < alpha).sum()) for alpha in ALPHAS},
                "largest": float(result.statistic.max()),
            }
        return found

    def certificates(self, build, patch):
        """How far the patch, tuned alone or transferred, agrees with the tuned embedding."""
        transferred = self.transferred(build)
        made = {"tuned alone": patch, "transferred": transferred.patch_of(transferred.ticket())}
        held_out = build.held_out.first(PAIRS)
        return {
            mode: write(certify(build, each, held_out, max_new_tokens=NEW_TOKENS, part="held-out"))
            for mode, each in made.items()
        }

    def transferred(self, build):
        return Build(dataclasses.replace(build.config, mode="transfer"), build.run, self.reporter, build.loaded)

    def elsewhere(self, build, patch):
        """The patch on texts of other domains than its own."""
        language = build.config.language
        own = next(domain for (domain, _), each in self.builds.items() if each is build)
        texts = {
            "udhr": build.encode(
                read_pairs(str(self.folder / "udhr" / f"en-{language}.jsonl"), Columns("source", "target", "page")),
                "test",
            )
        }
        for domain in ("gnome", "quran"):
            if domain != own and (domain, language) in self.builds:
                texts[domain] = self.builds[domain, language].held_out.first(PAIRS)
        return {
            domain: self.score(build, {"patch": {0: patch}}, held_out, "given") for domain, held_out in texts.items()
        }

    def harm(self, build, patch):
        """Loss per token of text that is nobody's task: the Declaration in several languages, without any prompt.

        A text is some of its articles, one on a line.
        """
        systems = {"base": None, "patch": patch, row_name("\n"): self.by_hand(build, "\n")}
        texts = {"en": []}
        for _, language in HELP:
            pairs = read_pairs(str(self.folder / "udhr" / f"en-{language}.jsonl"), Columns())
            texts[language] = [pair.target for pair in pairs]
            texts["en"] = texts["en"] or [pair.source for pair in pairs]
        found = {}
        for language, lines in texts.items():
            together = ["\n".join(lines[i : i + ARTICLES]) for i in range(0, len(lines), ARTICLES)]
            encoded = [build.tokenizer(text).input_ids for text in together]
            examples = [Example(ids[:1], ids[1:]) for ids in encoded]
            found[language] = {}
            for name, system in systems.items():
                with attach(build.model) as handle:
                    slot = 0 if system is None else handle.bank.add(slot_rows(system))
                    with handle.serving(slot):
                        losses, tokens = answer_losses(build.model, examples, marking=handle.marking)
                found[language][name] = sum(losses) / sum(tokens)
        return found

    def make(self):
        for part, wanted in WANTED.items():
            for which in wanted:
                self.once(which, part)


def changed(config: BuildConfig, which) -> dict:
    """The settings that are not the usual ones, so that a later version's new ones make nothing again."""
    usual = {each.name: each.default for each in dataclasses.fields(BuildConfig)}
    found = {name: value for name, value in dataclasses.asdict(config).items() if value != usual[name]}
    return found | {"base": "gemma3", "pairs": "/".join(which)}


def whole(config: dict) -> dict:
    """Settings with the usual ones beside them."""
    return {each.name: each.default for each in dataclasses.fields(BuildConfig)} | config


def keep_part(results: Path, part: str, which, of: dict, make) -> bool:
    """Compute a part of a study, unless it is kept with the same settings; whether it was computed."""
    of = json.loads(json.dumps(of))
    file = results / f"{part}-{'-'.join(which)}.json"
    if file.is_file() and json.loads(file.read_bytes())["of"] == of:
        return False
    kept = {"of": of, "machine": machine(), "value": make()}
    write_atomically(file, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())
    return True


def named(which: str) -> str:
    """A build in words: "German", or "Russian, the Quran's verses"."""
    domain, language = which.split("-")
    return language_name(language) + ("" if domain == "gnome" else f", {DOMAINS[domain]}")


def figures_table(rows: list[tuple[str, SystemScores]], first: str = "") -> str:
    shown = [metric for metric in COLUMNS if any(metric in system.figures for _, system in rows)]
    head = (first, "rows", *(METRICS[metric][0] for metric in shown))
    lines = [
        (name, system.size, *(with_interval(metric, system.figures.get(metric)) for metric in shown))
        for name, system in rows
    ]
    return markdown_table(head, lines)


def leads_table(evaluation: Evaluation) -> str:
    """The patch minus each system, and where each system's gain comes from."""
    lines = [
        (
            system.label,
            against("loss", system.figures["loss"]),
            against("chrf_first_line", system.figures["chrf_first_line"]),
            *(difference("chrf", part) for part in (system.split.raw, system.split.content, system.split.stopping)),
        )
        for system in evaluation.ordered
        if system.split is not None
    ]
    head = ("", "patch minus it: loss", "chrF++ first line", "its gain in chrF++ raw", "content", "stopping")
    return markdown_table(head, lines)


def tokens_of(tokens: list[str]) -> str:
    return " ".join(
        f"`` {json.dumps(token, ensure_ascii=False)} ``"
        if "`" in token
        else f"`{json.dumps(token, ensure_ascii=False)}`"
        for token in tokens
    )


def damping_table(results: dict) -> str:
    """What benchmarks/damping.py found."""
    rows = results["config"]["top_k"]
    lines = [
        ("on" if each["damp_rare"] else "off", each["rate"], each["significant"], f"{each['largest']:.3f}",
         f"{each['frequent']} of {rows}", f"{each['count']:g}", f"{each['embedding']:.3f}", f"{each['patch']:.3f}",
         tokens_of(each["tokens"][:10]))
        for each in results["builds"]
    ]  # fmt: skip
    head = ("`--damp-rare`", "learning rate", "rows with p < 0.05", "largest D", f"among the {rows} most frequent",
            "median count", "dev loss, embedding tuned", f"dev loss, {rows} rows", "first tokens by D")  # fmt: skip
    said = (
        f"{results['config']['base']}, {results['config']['pairs']}, {results['dev_pairs']} dev pairs, one seed, "
        f"{results['config']['embed_steps']} + {results['config']['steps']} steps x {results['config']['batch_size']}, "
        f"dev loss of the base {results['base']:.3f}, of the {rows} most frequent rows {results['frequency']:.3f}."
    )
    return f"{said}\n\n{markdown_table(head, lines)}"


def patch_of(evaluation: Evaluation) -> SystemScores:
    return next(system for system in evaluation.systems if system.name == "patch")


def kept_in(results: Path, wanted: dict[str, list]) -> dict[str, dict[str, dict]]:
    """What there is of each part, by part and build."""
    files = {
        part: {"-".join(which): results / f"{part}-{'-'.join(which)}.json" for which in builds}
        for part, builds in wanted.items()
    }
    return {
        part: {which: json.loads(file.read_bytes()) for which, file in of.items() if file.is_file()}
        for part, of in files.items()
    }


def kept_results() -> dict[str, dict[str, dict]]:
    """That of this study. Raises ValueError where parts are of several settings."""
    kept = kept_in(RESULTS, WANTED)
    known = {
        json.dumps([one["of"][name] for name in ("constants", "base")]) for of in kept.values() for one in of.values()
    }
    if len(known) > 1:
        raise ValueError("the kept parts are of several settings or bases: make those of before again.")
    return kept


TABLES = {}


def table(function):
    """A part of the document, by the function's name: made of the part of the study that its arguments name."""
    TABLES[function.__name__] = function
    return function


def evaluations(part: dict) -> dict[str, Evaluation]:
    return {which: read(Evaluation, value) for which, value in part.items()}


def only(part: dict):
    """What a part has of the first build, on which some are measured alone."""
    return part["-".join(FIRST)]


@table
def main(main):
    return "\n\n".join(
        f"### {named(which)}\n\n{figures_table([(system.label, system) for system in evaluation.ordered])}\n\n"
        f"{leads_table(evaluation)}"
        for which, evaluation in evaluations(main).items()
    )


@table
def verses(verses):
    return main(verses)


@table
def occurrences(main):
    evaluation = only(evaluations(main))
    head, cells = occurrence_table(evaluation)
    lines = [(tokens_of([row.token]), *cells[row.token_id]) for row in evaluation.occurrences]
    return markdown_table(("row", *head), lines)


@table
def seeds(seeds):
    found = evaluations(seeds)
    lines = [
        (named(which), *(" / ".join(f"{value:.3f}" for value in system.figures["loss"].per_seed)
                         for system in evaluation.ordered))
        for which, evaluation in found.items()
    ]  # fmt: skip
    return markdown_table(("held-out loss", *(system.label for system in only(found).ordered)), lines)


@table
def single(single):
    found = only(single)
    best_first = sorted(found["rows"], key=lambda each: each["loss"])
    gain = found["base"] - found["patch"]
    lines = [
        (name, f"{loss:.3f}", f"{(found['base'] - loss) / gain:.0%}")
        for name, loss in (
            ("base", found["base"]),
            (f"patch, {ROWS} rows", found["patch"]),
            *((tokens_of([each["token"]]), each["loss"]) for each in best_first),
        )
    ]
    return markdown_table(("", "dev loss", f"of the gain of {ROWS} rows"), lines)


@table
def transfer(main, transfer):
    alone = evaluations(main)
    rows = [
        (f"{named(which)}, {what}", patch_of(evaluation))
        for which, transferred in evaluations(transfer).items()
        for what, evaluation in (("tuned alone", alone[which]), ("transferred", transferred))
    ]
    return figures_table(rows)


@table
def ticket(ticket):
    sizes = sorted(only(ticket)["frequent"], key=int)
    head = ("", "tokens seen", "largest D", "rows with p < 0.05", "rank correlation of D and frequency",
            *(f"of its top {k}, among the {k} most frequent" for k in sizes), "its tokens by D")  # fmt: skip
    lines = [
        (named(which), f"{t['seen']:,}", f"{t['largest']:.3f}", t["significant"], f"{t['spearman']:.2f}",
         *(t["frequent"][k] for k in sizes), tokens_of(t["tokens"]))
        for which, t in ticket.items()
    ]  # fmt: skip
    return markdown_table(head, lines)


@table
def overlap(ticket):
    def shared(a: str, b: str) -> str:
        both = (len(set(ticket[a][which]) & set(ticket[b][which])) for which in ("top", "most_frequent"))
        return "" if a == b else "{} ({})".format(*both)

    lines = [(named(a), *(shared(a, b) for b in ticket)) for a in ticket]
    return markdown_table((f"shared among the first {ROWS}", *map(named, ticket)), lines)


@table
def certificates(certificates):
    lines = [
        (
            f"{named(which)}, {mode}",
            f"{c.exact} of {c.pairs}",
            *(f"{bound.share:.0%}, at least {at_least(bound.lower)}" for bound in (c.next_token, c.continuation)),
            f"{c.margin.certified} of {c.margin.examples}",
            c.margin.violations,
        )
        for which, modes in certificates.items()
        for mode, value in modes.items()
        for c in (read(Certificate, value),)
    ]
    head = ("", "bit-equal inputs", "same next token", "same output", "margin above 2 tau", "of these, changed")
    return markdown_table(head, lines)


@table
def alpha(sizes):
    significant = only(sizes)["significant"]
    return markdown_table(("alpha", *significant), [("rows with p < alpha", *significant.values())])


@table
def sizes(sizes):
    systems = read(Evaluation, only(sizes)["evaluation"]).systems
    rows = [("base" if system.name == "base" else "KS ticket", system) for system in systems]
    return figures_table(sorted(rows, key=lambda row: row[1].rows))


@table
def power(power):
    head = ("learning rate", "held-out loss of the tuned embedding", "largest D", *(f"p < {a}" for a in ALPHAS))
    lines = [
        (rate, f"{tuned['loss']:.3f}", f"{tuned['largest']:.3f}", *tuned["significant"].values())
        for rate, tuned in only(power).items()
    ]
    return markdown_table(head, lines)


@table
def places(places):
    systems = [read(SystemScores, system) for system in only(places)]
    return figures_table([(system.name, system) for system in systems], "rows act on")


@table
def templates(templates):
    rows = [
        (f"{name}: {system.label}", system)
        for name, evaluation in only(templates).items()
        for system in read(Evaluation, evaluation).systems
    ]
    return figures_table(rows, "prompt")


@table
def elsewhere(elsewhere):
    rows = [
        (f"{named(which)}, on {DOMAINS[domain]}: {system.label}", system)
        for which, domains in elsewhere.items()
        for domain, evaluation in domains.items()
        for system in read(Evaluation, evaluation).systems
    ]
    return figures_table(rows, "patch")


@table
def harm(harm):
    by_language = only(harm)
    names = next(iter(by_language.values()))
    lines = [(name, *(f"{losses[name]:.3f}" for losses in by_language.values())) for name in names]
    return markdown_table(("loss per token", *map(language_name, by_language)), lines)


def notes(parts: dict[str, dict]) -> list[str]:
    """What is to be known of the evaluations, and of which of them where it is not of all, and their intervals."""
    found = {which: each for part in ("main", "verses") for which, each in evaluations(parts[part]).items()}
    whose: dict[str, list[str]] = {}
    for which, evaluation in found.items():
        signatures = (f"{name}: `{value}`" for name, value in evaluation.signatures.items())
        for note in (*signatures, *evaluation.notes):
            if not note.startswith(("These are ", "One training seed")):
                whose.setdefault(note, []).append(named(which))
    lines = [note if len(names) == len(found) else f"{'; '.join(names)}: {note}" for note, names in whose.items()]
    count = sum(map(int, re.findall(r"These are (\d+) intervals", json.dumps(parts))))
    return [
        *lines,
        "One training seed, save where two stand beside each other.",
        f"The page has more than {count:,} intervals of 95 %, each by itself: one in twenty misses by chance alone.",
    ]


def not_measured(kept: dict[str, dict[str, dict]], wanted: dict[str, list]) -> str:
    """What is not measured yet, as a paragraph; empty where nothing is missing."""
    missing = [
        f"{part} ({', '.join(left)})"
        for part, builds in wanted.items()
        if (left := [named("-".join(which)) for which in builds if "-".join(which) not in kept[part]])
    ]
    return f"\n\n**Not measured yet:** {'; '.join(missing)}." if missing else ""


def setting(kept: dict[str, dict[str, dict]]) -> str:
    """What everything was measured with, and what is not measured yet."""
    each = [one for of in kept.values() for one in of.values()]
    config, cpu = whole(each[0]["of"]["config"]), each[0]["machine"]
    return (
        f"{PAIRS} held-out sentences of each; {ROWS} rows; {config['embed_steps']} steps of embedding tuning and "
        f"{config['steps']} of partial tuning, batch {config['batch_size']}, learning rates {config['embed_lr']} and "
        f"{config['lr']} standard deviations of the table; greedy, at most {NEW_TOKENS} new tokens. "
        f"Machine: {cpu['cpu']}, {cpu['cores']} cores."
        + "\n".join(["\n", *(f"- {note}" for note in notes(values(kept)))])
        + not_measured(kept, WANTED)
    )


def values(kept: dict[str, dict[str, dict]]) -> dict[str, dict]:
    return {part: {which: one["value"] for which, one in of.items()} for part, of in kept.items()}


def tables(kept: dict[str, dict[str, dict]], damping_results: dict) -> dict[str, str]:
    """Every part of the document that can be made, by name."""
    found, parts = {"damping": damping_table(damping_results)}, values(kept)
    if parts["main"]:
        found["setting"] = setting(kept)
    for name, function in TABLES.items():
        needs = [parts[part] for part in inspect.signature(function).parameters]
        if all(needs):
            found[name] = function(*needs)
    return found


def fill(document: str, parts: dict[str, str]) -> str:
    """Put the parts between their marks. Raises ValueError when the marks and the parts are not the same."""
    marks = re.findall(r"<!-- study:(\w+) -->", document)
    if sorted(marks) != sorted(parts):
        raise ValueError(f"the document has the marks {sorted(marks)}, and the study gives {sorted(parts)}.")
    for name, text in parts.items():
        begin, end = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
        before, _, rest = document.partition(begin)
        document = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return document


def make(study: type, folder: Path, results: Path) -> None:
    results.mkdir(exist_ok=True)
    with RichReporter(console) as reporter:
        study(folder, reporter).make()


def write_tables(document: Path, results: Path, parts: dict[str, str]) -> None:
    write_atomically(document, fill(document.read_text(encoding="utf-8"), parts).encode())
    console.print(f"Wrote {results} and the tables of {document}.")


def command(study: type, document: Path, results: Path, tables) -> click.Command:
    """The command line of a study. tables: gives the document's parts from the kept results, by name."""

    @click.command()
    @click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".demo")
    @click.option("--tables", "only_tables", is_flag=True, help="Write the tables of the kept results only.")
    def run_study(folder: Path, only_tables: bool) -> None:
        if not only_tables:
            make(study, folder, results)
        write_tables(document, results, tables())

    return run_study


if __name__ == "__main__":
    command(Study, DOCUMENT, RESULTS, lambda: tables(kept_results(), json.loads(DAMPING.read_bytes())))()
