"""Two languages for one base, and what their patches do on pages that no training saw. `make demo` runs this.

    python examples/demo/demo.py .demo

What it shows it also writes to `.demo/demo.json`, of which readme.py makes the README's part.
"""

import json
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksl_patch.data.languages import language_name
from ksl_patch.errors import KslPatchError
from ksl_patch.evidence.evaluate import evaluate
from ksl_patch.evidence.outputs import Cache
from ksl_patch.evidence.scorer import first_line
from ksl_patch.hf import generate, prompt_ids
from ksl_patch.patch.evaluation import Evaluation, write
from ksl_patch.patch.wording import from_base, show, where_from
from ksl_patch.report.page import AllRows, make_report
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import RichReporter

# GNOME's help, or, where that could not be had, verses.
DOMAINS = {"gnome": (("de", "ru"), "GNOME's help", "CC-BY-SA-3.0"), "quran": (("es", "ru"), "verses", "CC-BY-4.0")}
SCORED, SHOWN, NEW_TOKENS = 32, 4, 60
METRICS = ("chrf", "chrf_first_line", "in_language", "stop_rate", "characters", "loss")
console = Console(width=None if Console().is_terminal else 120)


def settings(folder: Path, domain: str, language: str) -> BuildConfig:
    """Fewer steps than the defaults, for two cores and ten minutes; whole pages are held out."""
    return BuildConfig(
        base=str(folder / "gemma3"),
        pairs=str(folder / domain / f"en-{language}.jsonl"),
        group="page",
        language=language,
        name=f"gemma3-en-{language}",
        alpha=None,
        top_k=18,
        embed_steps=30,
        steps=40,
        dev=32,
        held_out=192,  # whole pages, of which SCORED sentences are measured
        licence=f"Gemma's terms; pairs {DOMAINS[domain][2]}",
    )


def build_and_measure(folder: Path, config: BuildConfig, first: Build | None, reporter: RichReporter):
    """The build, its patch with what was measured of it, and the patch's file."""
    build = Build(config, folder / "run", reporter, first and first.loaded)
    patch = build.patch()
    evaluation = evaluate(
        build.model, build.tokenizer, build.held_out.first(SCORED), {"patch": {0: patch}}, reporter,
        max_new_tokens=NEW_TOKENS, cache=Cache.of(build), part="held-out", source_language=config.source_language,
    )  # fmt: skip
    patch = patch.with_meta(evaluation=write(evaluation))
    path = folder / f"{config.language}.safetensors"
    patch.save(path)
    return build, patch, evaluation, path


def show_figures(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """A line for each metric: the base, the patch, and their difference with its interval."""
    base, patch = (next(s for s in evaluation.systems if s.name == name).figures for name in ("base", "patch"))
    lines = [
        (evaluation.metrics[m], show(m, base[m].value), show(m, patch[m].value), from_base(m, patch[m]))
        for m in METRICS
        if m in evaluation.metrics
    ]
    result = Table(title=evaluation.what, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "base", "patch", f"difference, {evaluation.confidence:.0%} interval"):
        result.add_column(name, justify="right" if name else "left")
    for line in lines:
        result.add_row(*line)
    console.print(result)
    console.print(where_from(evaluation), highlight=False)
    return lines


def show_samples(samples: list[dict[str, str]]) -> None:
    result = Table(title="Held-out sentences", title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
    for name in samples[0]:
        result.add_column(name, ratio=1, overflow="fold")
    for sample in samples:
        result.add_row(*(Text(cell) for cell in sample.values()))
    console.print(result)


def main(folder: Path) -> None:
    began = time.perf_counter()
    domain = "gnome" if (folder / "gnome" / "en-de.jsonl").is_file() else "quran"
    languages, texts, _ = DOMAINS[domain]
    shown, made, first = [], [], None
    for language in languages:
        console.rule(f"English to {language_name(language)}, {texts}")
        with RichReporter(console) as reporter:
            build, patch, evaluation, path = build_and_measure(
                folder, settings(folder, domain, language), first, reporter
            )
        first = first or build
        rows = [build.tokenizer.decode([i]) for i in patch.token_ids]
        console.print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes", highlight=False)
        console.print("the rows of", *map(repr, rows), highlight=False, markup=False)
        samples = [
            {
                "English": sample.source,
                "base": first_line(sample.base),
                "patch": first_line(sample.patch),
                "reference": sample.reference,
            }
            for sample in evaluation.samples[:SHOWN]
        ]
        show_samples(samples)
        figures = show_figures(evaluation)
        made.append(patch)
        shown.append(
            {
                "language": language_name(language),
                "bytes": path.stat().st_size,
                "rows": rows,
                "pairs": evaluation.what,
                "confidence": evaluation.confidence,
                "figures": figures,
                "where_from": where_from(evaluation),
                "samples": samples,
            }
        )
    console.rule("One batch, three choices")
    assert first is not None
    sentence = first.held_out.pairs[SHOWN].source  # one that was not shown yet
    choices = [None, *made]
    templates = [patch.meta.template for patch in (made[0], *made)]
    prompts = prompt_ids(first.tokenizer, [template.render(sentence) for template in templates])
    outputs = generate(first.model, first.tokenizer, prompts, choices, max_new_tokens=NEW_TOKENS)
    names = ["base", *(each["language"] for each in shown)]
    batch = [(name, first_line(output.text)) for name, output in zip(names, outputs, strict=True)]
    result = Table(title=sentence, title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("patch")
    result.add_column("output, first line", overflow="fold")
    for name, text in batch:
        result.add_row(name, Text(text))
    console.print(result)
    tests = [AllRows.of(patch, folder / "run") for patch in made]
    (folder / "report.html").write_text(make_report(made, tests), encoding="utf-8")
    seconds = time.perf_counter() - began
    found = {"texts": texts, "languages": shown, "sentence": sentence, "batch": batch}
    (folder / "demo.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    patches = " ".join(f"--patch {language}={folder / language}.safetensors" for language in languages)
    console.print(f"{seconds:.0f} s. All of it as a page: {folder / 'report.html'}", highlight=False)
    console.print("Serve both from one model (vLLM in an environment of its own, 3.5 GB):", highlight=False)
    console.print(
        f"  make .venv-vllm/dev && .venv-vllm/bin/ksl-patch serve {folder / 'gemma3'} {patches}", soft_wrap=True
    )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
    except KslPatchError as error:
        sys.exit(f"Error: {error}")
