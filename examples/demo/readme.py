"""The README's part about the demo, made of what the demo showed.

    python examples/demo/readme.py             write it, of docs/demo.json
    python examples/demo/readme.py .demo       the same, with .demo/demo.json as the new docs/demo.json

tests/test_docs.py checks that the README has what this makes of docs/demo.json. docs/demo.svg is a recording of a second
run: `asciinema rec` and npm's svg-term-cli, see docs/development.md.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README, SHOWN = ROOT / "README.md", ROOT / "docs" / "demo.json"
BEGIN, END = "<!-- demo: written by examples/demo/readme.py -->\n", "<!-- end of demo -->\n"
SENTENCES = 2  # of each language


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def part(shown: dict[str, Any]) -> str:
    """The README's lines."""
    text = ""
    for each in shown["languages"]:
        rows = ", ".join(f"`{json.dumps(row, ensure_ascii=False)[1:-1]}`" for row in each["rows"])
        text += (
            f"**English to {each['language']}**, {each['pairs']} of {shown['texts']}, whole pages held out; "
            f"{len(each['rows'])} rows in {each['bytes']:,} bytes ({rows}):\n\n"
        )
        header = ["", "base", "patch", f"difference, {each['confidence']:.0%} interval"]
        text += table(header, each["figures"]) + f"\n{each['where_from']}\n\n"
        samples = [list(sample.values()) for sample in each["samples"][:SENTENCES]]
        text += table(list(each["samples"][0]), samples) + "\n"
    text += f'One batch, one model, three choices for "{shown["sentence"]}":\n\n'
    return text + table(["patch", "output, first line"], shown["batch"])


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
