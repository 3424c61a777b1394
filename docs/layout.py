"""Writes what rooms and files of the package say of themselves into README.md and docs/development.md.

python docs/layout.py
"""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ksl_patch"
MARK = "<!-- layout: written by docs/layout.py -->\n"
# The contract of imports, from what imports most to what imports least.
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
ROOMS = [name for layer in reversed(LAYERS) for name in re.split(r" [|:] ", layer) if (PACKAGE / name).is_dir()]
ALONE = (
    "The KS test, the choice of rows (ticket), rows put over an embedding (overlay), two patches in one, small things"
)


def first_sentence(file: Path) -> str:
    """The first sentence of a file's docstring, on one line and without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?=\s|$)", " ".join(text.split("\n\n")[0].split()))[0]


def files(folder: Path) -> list[Path]:
    """The files of a room, but for what makes it a package."""
    return [file for file in sorted(folder.glob("*.py")) if file.name not in ("__init__.py", "__main__.py")]


def by_room() -> str:
    """A line for each room, with links to its files."""
    alone = " ".join(f"[{file.stem}](ksl_patch/{file.name})" for file in files(PACKAGE))
    lines = [f"- [`ksl_patch/`](ksl_patch) {ALONE}: {alone}"]
    for room in ROOMS:
        links = " ".join(f"[{file.stem}](ksl_patch/{room}/{file.name})" for file in files(PACKAGE / room))
        links = "" if room == "cli" else f": {links}"
        lines.append(f"- [`{room}/`](ksl_patch/{room}) {first_sentence(PACKAGE / room / '__init__.py')}{links}")
    return "\n".join(lines)


def by_file() -> str:
    """Every file with its first sentence, by room."""
    lines = []
    for room in [None, *ROOMS]:
        folder = PACKAGE / room if room else PACKAGE
        lines += [f"**`{folder.relative_to(ROOT)}/`** {first_sentence(folder / '__init__.py')}.", ""]
        for file in files(folder):
            lines.append(f"- [{file.name}](../{file.relative_to(ROOT)}): {first_sentence(file)}")
        lines.append("")
    return "\n".join(lines).rstrip()


PAGES = {ROOT / "README.md": by_room, ROOT / "docs/development.md": by_file}


def written(text: str, made: str) -> str:
    """A page with what follows its mark, to the end, made anew."""
    return f"{text.partition(MARK)[0]}{MARK}{made}\n"


if __name__ == "__main__":
    for page, make in PAGES.items():
        page.write_text(written(page.read_text(encoding="utf-8"), make()), encoding="utf-8")
