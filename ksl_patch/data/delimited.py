"""Rows of tab-separated and comma-separated files as records, with or without a line of names."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ksl_patch.data.columns import Columns, Naming, are_names
from ksl_patch.data.languages import Languages
from ksl_patch.data.records import Record, Wrong
from ksl_patch.data.text_files import lines_of, text_of
from ksl_patch.errors import DataError

_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
_LONGEST_ROW = 100  # lines: a quote that nobody closes makes one row of the rest of a file
csv.field_size_limit(1 << 27)
# A place in words, a row's fields or why it has none, and the name of what separates them.
_Row = tuple[str, "list[str] | Wrong", str]


def tsv_rows(path: Path) -> Iterator[_Row]:
    """Rows of a file with a tab between fields."""
    for number, line in enumerate(lines_of(path), start=1):
        if line:
            # Quotes are text here, but for those that a writer of tables doubled.
            fields = [text[1:-1].replace('""', '"') if _QUOTED.fullmatch(text) else text for text in line.split("\t")]
            yield f"{path}, line {number}", fields, "tab"


def csv_rows(path: Path) -> Iterator[_Row]:
    """Rows of a table. A row with a wrong quote is one line; those behind it are read as ever."""
    lines, first = io.StringIO(text_of(path), newline="").readlines(), 0
    if lines and (excel := re.fullmatch(r'"?sep=(.)"?\s*', lines[0])):
        separator, first = excel[1], 1
    else:
        separator = _separator(lines)
    name = {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, repr(separator))
    while first < len(lines):
        rows, done, fields = csv.reader(lines[first:], delimiter=separator, strict=True), 0, None
        for _ in lines:
            begin, reason = first + done + 1, None
            try:
                fields = next(rows, None)
            except csv.Error as error:
                reason = f"not valid CSV ({error})."
            end, done = first + rows.line_num, rows.line_num
            if end - begin >= _LONGEST_ROW:
                raise DataError(f"{path}, line {begin}: a quote begins there that ends in line {end}, if at all.")
            if reason is not None:
                yield f"{path}, line {begin}", Wrong(reason), name
                break
            if fields is None:
                return
            if fields:
                yield f"{path}, line {begin}" if begin == end else f"{path}, lines {begin} to {end}", fields, name
        first = begin


def _separator(lines: list[str]) -> str:
    """The sign that cuts most of the lines into equally many fields, two or more."""
    best, found = 0, ","
    for separator in ",;\t":
        counts = Counter(len(row) for row in csv.reader(lines[:10_000], delimiter=separator) if row)
        most = max((count for size, count in counts.items() if size > 1), default=0)
        if most > best:
            best, found = most, separator
    return found


def under_names(path: Path, columns: Columns, languages: Languages, rows: Iterator[_Row]) -> Iterator[Record]:
    """Rows as records under a line of names, or of source and target."""
    names: list[str] | None = None
    for place, fields, separator in rows:
        if isinstance(fields, Wrong):
            yield place, fields
            continue
        if names is None:
            names = ["source", "target"]
            found = Naming(columns, languages).columns(fields)
            if found is not None:
                names = fields
                continue
            if columns != Columns():
                expected = ", ".join(map(repr, columns.names))
                raise DataError(f"{place}: expected a line with the columns' names {expected}, found {fields}.")
            if len(fields) > 1 and are_names(fields):
                raise DataError(
                    f"{place}: {', '.join(fields)} look like names of columns: say which has the source and which the "
                    "target with --columns, or write a line with source and target before it."
                )
        if len(fields) == len(names):
            yield place, dict(zip(names, fields, strict=True))
        else:
            positional = names == ["source", "target"]
            what = f"source, {separator}, target" if positional else f"{len(names)} fields"
            more = (
                " (--columns names two of more, under a first line of names)" if positional and len(fields) > 2 else ""
            )
            yield place, Wrong(f"expected {what}; found {len(fields)} fields{more}.")
