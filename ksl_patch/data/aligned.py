"""Two files with a sentence a line each, as `train.en` and `train.es`, and which of them has the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ksl_patch.data.columns import SOURCES, TARGETS
from ksl_patch.data.languages import Languages, says_language
from ksl_patch.data.records import Record
from ksl_patch.data.text_files import lines_of, unpacked
from ksl_patch.errors import DataError


def read_aligned(paths: list[Path], languages: Languages) -> Iterator[Record]:
    """Two files, a sentence a line each. Their names say which is which, where they say a language or a side."""
    if _is_swapped(paths, languages):
        paths = paths[::-1]
    texts = []
    for path in paths:
        lines = lines_of(path)
        while lines and not lines[-1].strip():
            lines.pop()
        texts.append(lines)
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{paths[0]} has {len(texts[0]):,} lines and {paths[1]} {len(texts[1]):,}: lines of the same number are to "
            "be a pair, so these are not each other's translation."
        )
    for number, (source, target) in enumerate(zip(*texts, strict=True), start=1):
        if source.strip() or target.strip():
            yield f"{paths[0]} and {paths[1]}, line {number}", {"source": source, "target": target}


def _is_swapped(paths: list[Path], languages: Languages) -> bool:
    """Whether the second of two files has the source. Raises DataError where their names are of other languages."""
    ends = [_end(path) for path in paths]
    if ends[0].casefold() in TARGETS and ends[1].casefold() in SOURCES:
        return True
    # Of each file for each side: of this language, of another one, or nothing that says a language.
    says = [[says_language(end, language) for language in languages] for end in ends]
    as_given, swapped = [says[0][0], says[1][1]], [says[0][1], says[1][0]]
    if True in swapped and False not in swapped and True not in as_given:
        return True
    if False in as_given:
        if True in swapped and False not in swapped:
            return True
        raise DataError(
            f"{paths[0]} and {paths[1]} are by their names of {ends[0]} and {ends[1]}, and the pairs are to be from "
            f"{languages[0]} to {languages[1]}."
        )
    return False


def _end(path: Path) -> str:
    name = unpacked(path)
    name = name.with_suffix("") if name.suffix.lower() == ".txt" else name
    return name.suffix.removeprefix(".") or name.name
