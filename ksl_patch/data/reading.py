"""Reads sentence pairs: picks the reader by a file's ending, and counts the lines that are no pair."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ksl_patch.data.aligned import read_aligned
from ksl_patch.data.columns import Columns, Naming
from ksl_patch.data.delimited import csv_rows, tsv_rows, under_names
from ksl_patch.data.languages import Languages, says_language
from ksl_patch.data.pairs import Pair
from ksl_patch.data.records import Record, Wrong, read_dataset, read_json, read_parquet
from ksl_patch.data.text_files import form_of, is_lines, is_packed
from ksl_patch.errors import DataError

_SHOWN = 10


@dataclass
class Reading:
    """What reading pairs meets beside them.

    strict: whether a line that is no pair is an error. Else it is left out; wrong: how many were, first: the first ten
    of them, each with its file, line and reason. messages: whether the pairs are a chat's turns.
    """

    strict: bool = False
    wrong: int = 0
    first: list[str] = field(default_factory=list)
    messages: bool = False

    def leave_out(self, error: DataError) -> None:
        """Count a line, or raise what is wrong with it."""
        if self.strict:
            raise error
        self.wrong += 1
        if len(self.first) < _SHOWN:
            self.first.append(str(error))


def read_pairs(
    where: str | Sequence[str],
    columns: Columns | tuple[str, str] = Columns(),  # noqa: B008 - immutable
    *,
    languages: Languages | None = None,
    limit: int | None = None,
    reading: Reading | None = None,
) -> list[Pair]:
    """Read pairs from files or from a Hugging Face dataset.

    where: .jsonl, .json (an array, or as .jsonl), .csv, .tsv or .txt (with tabs), .parquet, text files as .gz, .bz2,
        .xz or .zst too; two files with a sentence a line each, `train.en` and `train.es`; or a dataset as
        `id[@revision][:config[:split]]`. Several files are read one after the other.
    columns: names are found whatever their case and order. Without names of one's own, columns that are called as the
        two languages do as well, so do `translation` objects as the OPUS sets have them, and `messages` of a user and
        an assistant. A table without a line of names has the source first.
    languages: BCP 47 tags of source and target. limit: records to take of a dataset, which is then streamed.
    reading: where lines that are no pairs are counted and left out; without it the first of them is an error.

    Raises DataError that names the file and line, also where more lines are wrong than right.
    """
    places = [where] if isinstance(where, str) else list(where)
    columns = columns if isinstance(columns, Columns) else Columns(*columns)
    languages = languages or (None, None)
    reading = reading or Reading(strict=True)
    named, pairs, what = Naming(columns, languages), [], ", ".join(places)
    if not columns.by_default and False in map(says_language, columns[:2], languages):
        raise DataError(
            f"the columns are {columns.source} and {columns.target}, and the pairs are to be from {languages[0]} to "
            f"{languages[1]}: --columns names the source first."
        )
    try:
        for place, record in _records(places, columns, languages, limit):
            try:
                if isinstance(record, Wrong):
                    raise DataError(f"{place}: {record}")
                pairs.append(named.pair(record, place))
            except DataError as error:
                reading.leave_out(error)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{what}: cannot be read ({error}).") from error
    if not pairs or reading.wrong > len(pairs):
        count = (
            f"{reading.wrong:,} lines are no pairs, and {len(pairs):,} are" if pairs else "there are no sentence pairs"
        )
        reason = f" The first line that is none: {reading.first[0]}" if reading.first else ""
        raise DataError(f"{what}: {count} in it.{reason}")
    if named.messages and named.others:
        raise DataError(f"{what}: some records are chats (messages), and some are pairs: give one kind.")
    for side, texts in (("source", [p.source for p in pairs]), ("target", [p.target for p in pairs])):
        if 2 * sum(text.isdecimal() for text in texts) > len(texts):
            raise DataError(f"{what}: what was taken for the {side} is numbers: name the columns with --columns.")
    if 2 * sum(pair.source == pair.target for pair in pairs) > len(pairs):
        raise DataError(f"{what}: of most pairs, source and target are the same: name the columns with --columns.")
    reading.messages = named.messages
    return pairs


def _records(places: list[str], columns: Columns, languages: Languages, limit: int | None) -> Iterable[Record]:
    paths = [Path(place) for place in places]
    of_lines = list(map(is_lines, paths)) if len(paths) == 2 else [False]
    if all(of_lines):
        if columns != Columns():
            raise DataError(f"{paths[0]} and {paths[1]} are lines of text and have no columns.")
        return read_aligned(paths, languages)
    if any(of_lines):
        for path in paths:
            if not path.exists():
                raise DataError(f"{path}: no such file.")
    return chain.from_iterable(_read_one(place, columns, languages, limit) for place in places)


def _read_one(where: str, columns: Columns, languages: Languages, limit: int | None) -> Iterator[Record]:
    path = Path(where)
    form = form_of(path)
    if not path.is_file():
        local = path.is_absolute() or (len(path.parts) > 1 and path.parent.is_dir() and not path.exists())
        if form is not None or is_packed(path) or (local and not path.is_dir() and ":" not in where):
            raise DataError(f"{where}: no such file.")
        return read_dataset(where, limit)
    if form is None:
        raise DataError(
            f"{where}: the file's name must end in .jsonl, .csv, .tsv or .parquet, so that its format is known; of two "
            "files with a sentence a line each, give both."
        )
    if form == ".parquet":
        return read_parquet(path)
    if form in (".jsonl", ".json"):
        return read_json(path)
    return under_names(path, columns, languages, csv_rows(path) if form == ".csv" else tsv_rows(path))
