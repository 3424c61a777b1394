"""The README's part about the demo, made of what the demo showed.

    python examples/demo/readme.py             write it, of docs/demo.json
    python examples/demo/readme.py .demo       the same, with .demo/demo.json as the new docs/demo.json

tests/test_docs.py checks that the README has what this makes of docs/demo.json. docs/development.md says how the
recording docs/demo.svg is made.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ksl_patch.store.card import markdown_table

ROOT = Path(__file__).resolve().parents[2]
README, SHOWN = ROOT / "README.md", ROOT / "docs" / "demo.json"
BEGIN, END = "<!-- demo: written by examples/demo/readme.py -->\n", "<!-- end of demo -->\n"
SENTENCES = 2  # of each language


def plain(text: str) -> str:
    """A model's words, which Markdown is not to read; a table sees to the bars itself."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", text)


def part(shown: dict[str, Any]) -> str:
    """The README's lines."""
    each = shown["languages"]
    header, lines = ("",), [(line[0],) for line in each[0]["figures"]]
    for one in each:
        level = f"{one['confidence']:.0%}"
        header += (f"{one['language']}: base, patch", f"difference, {level} interval")
        lines = [
            (*line, f"{base} → **{patch}**", difference)
            for line, (_, base, patch, difference) in zip(lines, one["figures"], strict=True)
        ]
    sizes = " and ".join(f"{len(one['rows'])} rows ({one['bytes']:,} bytes)" for one in each)
    pairs = f"{each[0]['pairs']} of {shown['texts']}, whole pages held out, greedy"
    text = f"Patches of {sizes}; figures on {pairs}:\n\n" + markdown_table(header, lines) + "\n\n"
    text += " ".join(f"{one['language']}: {one['where_from']}" for one in each) + "\n\n"
    samples = [tuple(map(plain, sample.values())) for one in each for sample in one["samples"][:SENTENCES]]
    text += markdown_table(tuple(each[0]["samples"][0]), samples) + "\n\n"
    text += f"One batch, one model, three choices for *{shown['sentence']}*\n\n"
    batch = [(who, plain(text)) for who, text in shown["batch"]]
    return text + markdown_table(("patch", "output, first line"), batch) + "\n"


def written(readme: str, shown: dict[str, Any]) -> str:
    """The README with its part."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + "\n" + part(shown) + "\n" + END + after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        shutil.copy(Path(sys.argv[1]) / "demo.json", SHOWN)
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    README.write_text(written(README.read_text(encoding="utf-8"), shown), encoding="utf-8")
