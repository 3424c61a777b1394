"""The whole study of docs/experiments.md on SmolLM2: one command, about an hour on two cores, continues after a kill.

    make study        or: python benchmarks/study.py .demo

What is trained, generated and scored stays in FOLDER/study; figures go to benchmarks/results/study.json, and from there
into the tables of docs/experiments.md (`--tables` writes these alone).
"""

import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path

import click
import numpy as np
import scipy.stats
from machine import console, machine

from ksl_patch.certify import at_least
from ksl_patch.evidence import METRICS, Certificate, Evaluation, SystemScores, read, with_interval, write
from ksl_patch.patch import TemplateMeta, write_atomically
from ksl_patch.store.card import markdown_table
from ksl_patch.train.ablate import PLACES, run_at
from ksl_patch.train.agreement import certify
from ksl_patch.train.build import Build, BuildConfig
from ksl_patch.train.compare import evaluate, make_systems
from ksl_patch.train.data import language_name, make_template
from ksl_patch.train.evaluate import Scorer, run
from ksl_patch.train.progress import RichReporter

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/study.json", ROOT / "docs/experiments.md"
DAMPING = ROOT / "benchmarks/results/damping.json"
LANGUAGES = ("es", "fr", "id")
ROWS, SIZES, SEEDS, NEW_TOKENS = 32, (8, 128), 2, 60
OTHER_RATE = 0.05  # of the embedding tuning, for the power of the test
ALPHAS = (0.2, 0.1, 0.05, 0.01, 0.001)


def settings(folder: Path, language: str) -> BuildConfig:
    return BuildConfig(
        base=str(folder / "smollm2"),
        pairs=str(folder / f"en-{language}.jsonl"),
        language=language,
        name=f"smollm2-en-{language}",
        alpha=None,
        top_k=ROWS,
        embed_steps=60,
        steps=40,
    )


class Study:
    """Its parts are computed once and kept by name and by the settings of the language's build."""

    def __init__(self, folder: Path, reporter: RichReporter) -> None:
        self.folder, self.reporter = folder, reporter
        self.run = folder / "study"
        self.builds, self.patches = {}, {}
        loaded = None
        for language in LANGUAGES:
            build = self.builds[language] = Build(settings(folder, language), self.run, reporter, loaded)
            loaded = build.loaded

    def once(self, language, part, make):
        build = self.builds[language]
        key = json.dumps([dataclasses.asdict(build.config), build.loaded.digest, ROWS, SIZES, SEEDS, NEW_TOKENS])
        file = self.run / "parts" / f"{part}-{language}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        file.parent.mkdir(exist_ok=True)
        if not file.is_file():
            begun = time.perf_counter()
            if language not in self.patches:
                self.patches[language] = build.patch()
            value = make(build, self.patches[language])
            write_atomically(file, json.dumps({"seconds": round(time.perf_counter() - begun), "value": value}).encode())
            self.reporter.note("part", f"{language}: {part} is done")
        return json.loads(file.read_bytes())["value"]

    def score(self, build, systems, held_out=None):
        held_out = held_out or build.held_out
        result = evaluate(
            build.model, build.tokenizer, held_out, systems, self.reporter,
            max_new_tokens=NEW_TOKENS, cache=build.outputs, part="held-out",
        )  # fmt: skip
        return write(result)

    def main(self, build, patch):
        """The patch, the tuned embedding and the controls, with several training seeds."""
        return self.score(build, make_systems(patch, build, seeds=SEEDS))

    def sizes(self, build, patch):
        """Rows that are significant at each alpha, and what tickets of other sizes do."""
        pvalue = build.ks().pvalue
        systems = {str(k): {0: build.patch_of(build.ticket("ks", k))} for k in SIZES}
        return {
            "significant": {str(alpha): int((pvalue < alpha).sum()) for alpha in ALPHAS},
            "evaluation": self.score(build, {"patch": {0: patch}} | systems),
        }

    def ticket(self, build, patch):
        """How the ticket and the frequencies of its tokens hang together."""
        result, counts = build.ks(), build.embed_counts
        seen = np.flatnonzero(counts)
        top = {k: build.ticket("ks", k).token_ids for k in (*SIZES, ROWS)}
        frequent = {k: build.ticket("frequency", k).token_ids for k in top}
        largest = top[ROWS][np.argsort(-result.statistic[top[ROWS]], kind="stable")]
        return {
            "seen": len(seen),
            "largest": float(result.statistic.max()),
            "spearman": float(scipy.stats.spearmanr(result.statistic[seen], counts[seen]).statistic),
            "frequent": {str(k): int(np.isin(top[k], frequent[k]).sum()) for k in top},
            "top": top[ROWS].tolist(),
            "most_frequent": frequent[ROWS].tolist(),
            "tokens": [build.tokenizer.decode([i]) for i in largest[:18]],
        }

    def places(self, build, patch):
        """The same rows, acting at one place alone."""
        scorer = Scorer(build.held_out.references, language=build.config.language)
        base = run(build.model, build.tokenizer, build.held_out, None, max_new_tokens=NEW_TOKENS, cache=build.outputs)
        systems = [SystemScores(name="base", rows=[0], seeds=[], figures=scorer.of_base(base))]
        for place in PLACES:
            outputs = run_at(build.model, build.tokenizer, build.held_out, patch, place, max_new_tokens=NEW_TOKENS)
            figures = scorer.figures([outputs], base)
            systems.append(SystemScores(name=place, rows=[len(patch.token_ids)], seeds=[0], figures=figures))
        return [dataclasses.asdict(system) for system in systems]

    def templates(self, build, patch):
        """The patch under other prompts than the one it was trained with, each beside the base under that prompt."""
        source, target = "English", language_name(build.config.language)
        tokenizer = build.tokenizer
        others = {
            "the trained one": build.template,
            "a paraphrase": TemplateMeta(
                text=f"Please render the following {source} text in {target}.\n{source}: {{source}}\n{target}:",
                chat=False,
            ),
            "no instruction": TemplateMeta(text=f"{source}: {{source}}\n{target}:", chat=False),
            "the chat template": make_template(
                "chat", source_language="en", language=build.config.language, tokenizer=tokenizer
            ),
        }
        return {
            name: self.score(build, {"patch": {0: patch}}, build.encode(build.pairs.held_out, "held-out", template))
            for name, template in others.items()
        }

    def transfer(self, build, patch):
        """The ticket's rows taken from the tuned embedding instead of tuned alone."""
        transferred = self.transferred(build)
        return self.score(build, {"patch": {0: transferred.patch_of(transferred.ticket())}})

    def power(self, build, patch):
        """What the test sees after an embedding tuning at another learning rate."""
        config = dataclasses.replace(build.config, embed_lr=OTHER_RATE)
        found = {}
        for each in (Build(config, self.run, self.reporter, build.loaded), build):
            result = each.ks()
            found[f"{each.config.embed_lr:g}"] = {
                "loss": each.patched_loss(each.embedding_patch(), each.held_out),
                "significant": {str(alpha): int((result.pvalue < alpha).sum()) for alpha in ALPHAS},
                "largest": float(result.statistic.max()),
            }
        return found

    def certificates(self, build, patch):
        """How far the patch, tuned alone or transferred, says what the tuned embedding says."""
        transferred = self.transferred(build)
        made = {"tuned alone": patch, "transferred": transferred.patch_of(transferred.ticket())}
        return {
            mode: write(certify(build, each, build.held_out, max_new_tokens=NEW_TOKENS, part="held-out"))
            for mode, each in made.items()
        }

    def transferred(self, build):
        config = dataclasses.replace(build.config, mode="transfer")
        return Build(config, self.run, self.reporter, build.loaded)

    def results(self):
        first = LANGUAGES[0]
        each = ("main", "ticket", "transfer", "certificates")
        return {
            language: {part: self.once(language, part, getattr(self, part)) for part in each} for language in LANGUAGES
        } | {part: self.once(first, part, getattr(self, part)) for part in ("sizes", "power", "places", "templates")}

    def seconds(self):
        return sum(json.loads(file.read_bytes())["seconds"] for file in (self.run / "parts").iterdir())


def figures_table(rows: list[tuple[str, SystemScores]], first: str = "") -> str:
    head = (first, "rows", *(label for label, _, _ in METRICS.values()))
    lines = [
        (
            name,
            system.size,
            *(with_interval(metric, system.figures[metric]) for metric in METRICS),
        )
        for name, system in rows
    ]
    return markdown_table(head, lines)


def damping_table(results: dict) -> str:
    """What benchmarks/damping.py found."""
    rows = results["config"]["top_k"]
    lines = [
        ("on" if each["damp_rare"] else "off", each["rate"], each["significant"], f"{each['largest']:.3f}",
         f"{each['frequent']} of {rows}", f"{each['count']:g}", f"{each['embedding']:.3f}", f"{each['patch']:.3f}",
         " ".join(f"`{json.dumps(token, ensure_ascii=False)}`" for token in each["tokens"][:10]))
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


def tables(results: dict, damping: dict) -> dict[str, str]:
    """Every generated part of the document, by name."""
    found = {"damping": damping_table(damping)}
    per_language = {language: results["parts"][language] for language in results["languages"]}
    evaluations = {language: read(Evaluation, parts["main"]) for language, parts in per_language.items()}
    found["setting"] = (
        f"{', '.join(map(language_name, per_language))}; {next(iter(evaluations.values())).pairs} held-out pairs each; "
        f"{ROWS} rows; "
        f"{results['config']['embed_steps']} steps of embedding tuning and {results['config']['steps']} of "
        f"partial tuning, batch {results['config']['batch_size']}, learning rates {results['config']['embed_lr']} and "
        f"{results['config']['lr']} standard deviations of the table; {results['seeds']} training seeds; greedy, at "
        f"most {NEW_TOKENS} new tokens. Machine: {results['machine']['cpu']}, {results['machine']['cores']} cores. "
        f"Training and generation took {results['seconds'] / 60:.0f} minutes.\n\n"
        + "\n".join(f"- {name}: `{value}`" for name, value in next(iter(evaluations.values())).signatures.items())
        + "".join(f"\n- {note}" for note in next(iter(evaluations.values())).notes)
    )
    parts = []
    for language, evaluation in evaluations.items():
        rows = [(system.label, system) for system in evaluation.ordered]
        parts.append(f"### {language_name(language)}\n\n{figures_table(rows)}")
    found["main"] = "\n\n".join(parts)
    found["seeds"] = markdown_table(
        ("held-out loss", *(system.label for system in next(iter(evaluations.values())).ordered)),
        [
            (language_name(language), *(
                " / ".join(f"{value:.3f}" for value in system.figures["loss"].per_seed)
                for system in evaluation.ordered
            ))
            for language, evaluation in evaluations.items()
        ],
    )  # fmt: skip
    found["transfer"] = figures_table(
        [
            (f"{language_name(language)}, {what}", next(s for s in evaluation.systems if s.name == "patch"))
            for language, parts in per_language.items()
            for what, evaluation in (
                ("tuned alone, all seeds", evaluations[language]),
                ("transferred", read(Evaluation, parts["transfer"])),
            )
        ]
    )
    tickets = {language: parts["ticket"] for language, parts in per_language.items()}
    sizes_of = sorted(next(iter(tickets.values()))["frequent"], key=int)
    found["ticket"] = markdown_table(
        ("", "tokens seen", "largest D", "rank correlation of D and frequency",
         *(f"of its top {k}, among the {k} most frequent" for k in sizes_of),
         "its first tokens by D"),
        [
            (language_name(language), f"{t['seen']:,}", f"{t['largest']:.3f}", f"{t['spearman']:.2f}",
             *(t["frequent"][k] for k in sizes_of),
             " ".join(f"`{json.dumps(token, ensure_ascii=False)}`" for token in t["tokens"]))
            for language, t in tickets.items()
        ],
    )  # fmt: skip
    found["overlap"] = markdown_table(
        (f"shared among the first {ROWS}", *map(language_name, tickets)),
        [
            (language_name(a), *(
                "" if a == b
                else f"{len(set(tickets[a]['top']) & set(tickets[b]['top']))} "
                f"({len(set(tickets[a]['most_frequent']) & set(tickets[b]['most_frequent']))})"
                for b in tickets
            ))
            for a in tickets
        ],
    )  # fmt: skip
    sizes = results["parts"]["sizes"]
    found["certificates"] = markdown_table(
        ("", "bit-equal inputs", "same next token", "same output", "margin above 2 tau", "of these, changed"),
        [
            (
                f"{language_name(language)}, {mode}",
                f"{c.exact} of {c.pairs}",
                *(f"{bound.share:.0%}, at least {at_least(bound.lower)}" for bound in (c.next_token, c.continuation)),
                f"{c.margin.certified} of {c.margin.examples}",
                c.margin.violations,
            )
            for language, parts in per_language.items()
            for mode, value in parts["certificates"].items()
            for c in (read(Certificate, value),)
        ],
    )
    found["alpha"] = markdown_table(
        ("alpha", *sizes["significant"]), [("rows with p < alpha", *sizes["significant"].values())]
    )
    found["sizes"] = figures_table(
        sorted(
            (("base" if system.name == "base" else "KS ticket", system)
             for system in read(Evaluation, sizes["evaluation"]).systems),
            key=lambda row: row[1].rows,
        )
    )  # fmt: skip
    found["power"] = markdown_table(
        ("learning rate", "held-out loss of the tuned embedding", "largest D", *(f"p < {alpha}" for alpha in ALPHAS)),
        [
            (rate, f"{tuned['loss']:.3f}", f"{tuned['largest']:.3f}", *tuned["significant"].values())
            for rate, tuned in results["parts"]["power"].items()
        ],
    )
    systems = [read(SystemScores, system) for system in results["parts"]["places"]]
    found["places"] = figures_table([(system.name, system) for system in systems], "rows act on")
    found["templates"] = figures_table(
        [
            (f"{name}: {system.label}", system)
            for name, evaluation in results["parts"]["templates"].items()
            for system in read(Evaluation, evaluation).systems
        ],
        "prompt",
    )
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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".demo")
@click.option("--tables", "only_tables", is_flag=True, help="Write the tables of the kept results only.")
def main(folder: Path, only_tables: bool) -> None:
    if not only_tables:
        with RichReporter(console) as reporter:
            study = Study(folder, reporter)
            parts = study.results()
            config = dataclasses.asdict(study.builds[LANGUAGES[0]].config) | {"base": "smollm2", "pairs": "en-*.jsonl"}
        results = {
            "machine": machine(), "seconds": study.seconds(), "languages": LANGUAGES, "seeds": SEEDS, "config": config,
            "parts": parts,
        }  # fmt: skip
        write_atomically(RESULTS, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    parts = tables(json.loads(RESULTS.read_bytes()), json.loads(DAMPING.read_bytes()))
    filled = fill(DOCUMENT.read_text(encoding="utf-8"), parts)
    write_atomically(DOCUMENT, filled.encode())
    console.print(f"Wrote {RESULTS} and the tables of {DOCUMENT}.")


if __name__ == "__main__":
    main()
