"""Two patches for one base, and what they do on sentences that no training saw. `make demo` runs this.

python examples/demo/demo.py .demo
"""

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksl_patch.errors import KslPatchError
from ksl_patch.hf import generate, prompt_ids
from ksl_patch.train.build import Build, BuildConfig
from ksl_patch.train.data import language_name
from ksl_patch.train.evaluate import first_line, score, translate
from ksl_patch.train.progress import RichReporter

LANGUAGES = ("es", "fr")
SHOWN, TRANSLATED, NEW_TOKENS = 4, 24, 60
console = Console(width=None if Console().is_terminal else 120)


def settings(folder: Path, language: str) -> BuildConfig:
    """The setting of docs/experiments.md: half of the default steps, for two cores and ten minutes."""
    return BuildConfig(
        base=str(folder / "smollm2"),
        pairs=str(folder / f"en-{language}.jsonl"),
        language=language,
        name=f"smollm2-en-{language}",
        embed_steps=60,
        steps=60,
        licence="CC-BY-4.0",
    )


def figures(what: str, loss: float, completions, references) -> dict:
    return {"what": what, "loss": loss, **score(completions, references).as_dict()}


def show_figures(title: str, rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left")
    columns = {
        "what": "",
        "loss": "held-out loss",
        "chrf": "chrF, raw",
        "chrf_first_line": "chrF, first line",
        "stop_rate": "stops by itself",
        "characters": "mean characters",
    }
    for name in columns.values():
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        form = {"loss": ".3f", "stop_rate": ".0%", "characters": ".0f"}
        table.add_row(*(row[key] if key == "what" else f"{row[key]:{form.get(key, '.1f')}}" for key in columns))
    console.print(table)


def show_samples(pairs, base, patched) -> None:
    table = Table(title="Held-out sentences, first lines", title_justify="left", show_lines=True)
    for name in ("English", "base", "patched", "reference"):
        table.add_column(name, ratio=1, overflow="fold")
    for pair, before, after in zip(pairs, base, patched, strict=False):
        cells = (pair.source, first_line(before.text), first_line(after.text), pair.target)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def main(folder: Path) -> None:
    results, patches, builds = {}, {}, {}
    for language in LANGUAGES:
        console.rule(f"English to {language_name(language)}")
        with RichReporter(console) as reporter:
            build = Build(settings(folder, language), folder / "run", reporter)
            patch = build.patch()
        path = folder / f"{language}.safetensors"
        patch.save(path)
        console.print(f"{path}: {len(patch.token_ids)} rows, {path.stat().st_size:,} bytes, {patch.digest[:12]}")
        with console.status("translating held-out sentences"):
            pairs, examples = build.pairs.held_out[:TRANSLATED], build.held_out[:TRANSLATED]
            references = [pair.target for pair in pairs]
            base, patched = (
                translate(build.model, build.tokenizer, examples, p, max_new_tokens=NEW_TOKENS) for p in (None, patch)
            )
        rows = [
            figures("base", patch.meta.evaluation["loss_base"], base, references),
            figures("patch", patch.meta.evaluation["loss_patch"], patched, references),
        ]
        show_samples(pairs[:SHOWN], base, patched)
        show_figures(f"{len(build.held_out)} held-out pairs for the loss, {len(pairs)} translated", rows)
        results[language] = {"figures": rows, "digest": patch.digest, "config": dataclasses.asdict(build.config)}
        patches[language], builds[language] = patch, build

    console.rule("One batch, three choices")
    first = builds[LANGUAGES[0]]
    sentence = first.pairs.held_out[0].source
    choices = [None, *patches.values()]
    templates = [patches[LANGUAGES[0]].meta.template, *(patch.meta.template for patch in patches.values())]
    prompts = prompt_ids(first.tokenizer, [template.render(sentence) for template in templates])
    table = Table(title=f"{sentence}", title_justify="left")
    table.add_column("patch")
    table.add_column("output, first line", overflow="fold")
    for choice, output in zip(
        choices, generate(first.model, first.tokenizer, prompts, choices, max_new_tokens=60), strict=True
    ):
        table.add_row(choice.meta.name if choice else "base", Text(first_line(output.text)))
    console.print(table)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"Figures in {folder / 'results.json'}; the controls and what else was tried: docs/experiments.md")
    console.print(f"Try: .venv/bin/ksl-patch inspect {folder / LANGUAGES[0]}.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
    except KslPatchError as error:
        sys.exit(f"Error: {error}")
