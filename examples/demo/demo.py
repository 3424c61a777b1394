"""Two patches for one base, and what they do on sentences that no training saw. `make demo` runs this.

python examples/demo/demo.py .demo
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksl_patch.cli.eval import table
from ksl_patch.errors import KslPatchError
from ksl_patch.evidence import write
from ksl_patch.hf import generate, prompt_ids
from ksl_patch.report.page import AllRows, make_report
from ksl_patch.train.build import Build, BuildConfig
from ksl_patch.train.compare import evaluate
from ksl_patch.train.data import language_name
from ksl_patch.train.evaluate import first_line
from ksl_patch.train.progress import RichReporter

LANGUAGES = ("es", "fr")
SHOWN, SCORED, NEW_TOKENS = 4, 32, 60
console = Console(width=None if Console().is_terminal else 120)


def settings(folder: Path, language: str) -> BuildConfig:
    """Fewer steps than the defaults, for two cores and ten minutes."""
    return BuildConfig(
        base=str(folder / "smollm2"),
        pairs=str(folder / f"en-{language}.jsonl"),
        language=language,
        name=f"smollm2-en-{language}",
        embed_steps=60,
        steps=60,
        licence="CC-BY-4.0",
    )


def show_samples(samples) -> None:
    table = Table(title="Held-out sentences, first lines", title_justify="left", show_lines=True)
    for name in ("English", "base", "patched", "reference"):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples[:SHOWN]:
        cells = (sample.source, first_line(sample.base), first_line(sample.patch), sample.reference)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def main(folder: Path) -> None:
    patches, builds, tests = {}, {}, []
    for language in LANGUAGES:
        console.rule(f"English to {language_name(language)}")
        with RichReporter(console) as reporter:
            build = Build(settings(folder, language), folder / "run", reporter)
            patch = build.patch()
            evaluation = evaluate(
                build.model, build.tokenizer, build.held_out.first(SCORED), {"patch": {0: patch}}, reporter,
                max_new_tokens=NEW_TOKENS, cache=build.outputs, part="held-out",
            )  # fmt: skip
        patch = patch.with_meta(evaluation=write(evaluation))
        path = folder / f"{language}.safetensors"
        patch.save(path)
        tests.append(AllRows.of(patch, folder / "run"))
        console.print(f"{path}: {len(patch.token_ids)} rows, {path.stat().st_size:,} bytes, {patch.digest[:12]}")
        show_samples(evaluation.samples)
        console.print(table(evaluation, console.width))
        patches[language], builds[language] = patch, build

    console.rule("One batch, three choices")
    first = builds[LANGUAGES[0]]
    sentence = first.pairs.held_out[0].source
    choices = [None, *patches.values()]
    templates = [patches[LANGUAGES[0]].meta.template, *(patch.meta.template for patch in patches.values())]
    prompts = prompt_ids(first.tokenizer, [template.render(sentence) for template in templates])
    outputs = Table(title=f"{sentence}", title_justify="left")
    outputs.add_column("patch")
    outputs.add_column("output, first line", overflow="fold")
    for choice, output in zip(
        choices, generate(first.model, first.tokenizer, prompts, choices, max_new_tokens=60), strict=True
    ):
        outputs.add_row(choice.meta.name if choice else "base", Text(first_line(output.text)))
    console.print(outputs)
    report = folder / "report.html"
    report.write_text(make_report(list(patches.values()), tests), encoding="utf-8")
    console.print(f"All of it as a page: {report}; the controls and what else was tried: docs/experiments.md")
    console.print(f"Try: .venv/bin/ksl-patch inspect {folder / LANGUAGES[0]}.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
    except KslPatchError as error:
        sys.exit(f"Error: {error}")
