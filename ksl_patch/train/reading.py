"""Sentence pairs as the world keeps them: lines, tables, aligned files, Hugging Face datasets."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from ksl_patch.errors import DataError
from ksl_patch.train.pairs import Pair

_SHOWN = 10
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_FORMATS = (".jsonl", ".json", ".tsv", ".txt", ".csv", ".parquet")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What files call their columns, beside languages: as a first line, hardly a pair.
_NAMES = frozenset(
    ["source", "target", "src", "tgt", "trg", "text", "translation", "sentence", "reference", "original"]
)
csv.field_size_limit(1 << 27)


class Columns(NamedTuple):
    """Names of the columns of pairs: the two sentences, the document, and what else a prompt needs."""

    source: str = "source"
    target: str = "target"
    group: str | None = None
    fields: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [self.source, self.target, *([] if self.group is None else [self.group]), *self.fields]

    @property
    def by_default(self) -> bool:
        """Whether the two sentences' columns are the ones that nobody named."""
        return (self.source, self.target) == ("source", "target")


@dataclass
class Reading:
    """What reading pairs met beside them.

    wrong: lines that are no pairs, and were left out. first: the first ten of them, each with its file, line and
    reason. messages: whether the pairs are a chat's turns.
    """

    wrong: int = 0
    first: list[str] = field(default_factory=list)
    messages: bool = False

    def leave_out(self, reason: str) -> None:
        """Count a line."""
        self.wrong += 1
        if len(self.first) < _SHOWN:
            self.first.append(reason)


def read_pairs(
    where: str | Sequence[str],
    columns: Columns | tuple[str, str] = Columns(),  # noqa: B008 - immutable
    *,
    languages: tuple[str, str] | None = None,
    limit: int | None = None,
    reading: Reading | None = None,
) -> list[Pair]:
    """Read pairs from files or from a Hugging Face dataset.

    where: .jsonl, .json (an array, or as .jsonl), .csv, .tsv or .txt (with tabs), .parquet, text files as .gz, .bz2,
        .xz or .zst too; two files with a sentence a line each, `train.en` and `train.es`; or a dataset as
        `id[@revision][:config[:split]]`. Several files of one kind are read one after the other.
    columns: names are found whatever their case and order. Without names of one's own, columns that are called as the
        two languages do as well, so do `translation` objects as the OPUS sets have them, and `messages` of a user and
        an assistant. A table without a line of names has the source first.
    languages: BCP 47 tags of source and target. limit: records to take of a dataset, which is then streamed.
    reading: where lines that are no pairs are counted and left out; without it the first of them is an error.

    Raises DataError that names the file and line.
    """
    places = [where] if isinstance(where, str) else list(where)
    columns = columns if isinstance(columns, Columns) else Columns(*columns)
    if len(places) == 2 and all(_is_lines(Path(place)) for place in places):
        if columns != Columns():
            raise DataError(f"{places[0]} and {places[1]} are lines of text and have no columns.")
        records: Iterable[_Record] = _read_aligned(places, languages)
    else:
        records = chain.from_iterable(_read_one(place, columns, languages, limit) for place in places)
    named = _Named(columns, languages)
    pairs = []
    try:
        for place, record in records:
            try:
                if isinstance(record, _Wrong):
                    raise DataError(f"{place}: {record}")
                pairs.append(named.pair(record, place))
            except DataError as error:
                if reading is None:
                    raise
                reading.leave_out(str(error))
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise DataError(f"{', '.join(places)}: cannot be read as UTF-8 text ({error}).") from error
    if not pairs:
        reason = f" The first line that is none: {reading.first[0]}" if reading is not None and reading.first else ""
        raise DataError(f"{', '.join(places)}: there are no sentence pairs in it.{reason}")
    if reading is not None:
        reading.messages = named.messages
    return pairs


class _Wrong(str):
    """Why a place holds no record."""


# A place in words, and what is there: values by column, if it is a pair.
_Record = tuple[str, Any]


class _Named:
    """Which columns hold what, found for each set of names once."""

    def __init__(self, columns: Columns, languages: tuple[str, str] | None) -> None:
        self._columns, self._languages = columns, languages
        self._known: dict[tuple[str, ...], Columns | None] = {}
        self.messages = False

    def columns(self, names: Sequence[str]) -> Columns | None:
        """The columns by the names that they have here; None where one is missing."""
        key = tuple(names)
        if key not in self._known:
            self._known[key] = self._find(key)
        return self._known[key]

    def _find(self, names: tuple[str, ...]) -> Columns | None:
        wanted = self._columns
        found = {name: _called(name, names) for name in wanted.names}
        if self._languages is not None and wanted.by_default and not (found["source"] or found["target"]):
            for name, language in zip(("source", "target"), self._languages, strict=True):
                found[name] = _of_language(language, names)
        if not all(found.values()) or found[wanted.source] == found[wanted.target]:
            return None
        group = None if wanted.group is None else found[wanted.group]
        return Columns(
            str(found[wanted.source]), str(found[wanted.target]), group, tuple(str(found[n]) for n in wanted.fields)
        )

    def pair(self, record: Any, place: str) -> Pair:
        """A record's pair. Raises DataError."""
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, found {type(record).__name__}.")
        inner = record.get("translation")
        if isinstance(inner, dict):  # as OPUS sets have it
            record = {**record, **inner}
        columns = self.columns(list(record))
        if columns is None and self._columns.by_default and isinstance(record.get("messages"), list):
            record, columns = record | _turns(record["messages"], place), self._columns
            self.messages = True
        if columns is None or not set(columns.names) <= record.keys():
            expected = ", ".join(map(repr, self._columns.names))
            raise DataError(f"{place}: expected the columns {expected}, found {sorted(map(str, record))}.")
        return _pair(record, columns, self._columns.fields, place)


def _called(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that is this one, if need be in another case."""
    if name in names:
        return name
    alike = [other for other in names if isinstance(other, str) and other.strip().casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def _of_language(tag: str, names: Sequence[str]) -> str | None:
    """The one of `names` that is this language's tag, or a closer or a wider one of it: "pt" for "pt-BR"."""
    import langcodes

    wanted = langcodes.get(tag)
    exact, near = [], []
    for name in names:
        if not isinstance(name, str) or not _is_tag(name):
            continue
        other = langcodes.get(name.strip().replace("_", "-"))
        if other.to_tag() == wanted.to_tag():
            exact.append(name)
        elif other.language == wanted.language:
            near.append(name)
    found = exact or near
    return found[0] if len(found) == 1 else None


def _is_tag(text: str) -> bool:
    import langcodes

    text = text.strip().replace("_", "-")
    return 2 <= len(text) <= 12 and bool(langcodes.tag_is_valid(text))


def _turns(messages: list[Any], place: str) -> dict[str, Any]:
    """The two turns of a chat as source and target."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(f"{place}: expected messages of a user and an assistant, found {roles}.")
    return {"source": messages[0].get("content"), "target": messages[1].get("content")}


def _pair(record: dict[str, Any], columns: Columns, fields: Sequence[str], place: str) -> Pair:
    source, target = record[columns.source], record[columns.target]
    if not all(isinstance(text, str) and text.strip() for text in (source, target)):
        raise DataError(f"{place}: source and target must both be text that is not empty.")
    if any(0xD800 <= ord(c) < 0xE000 for text in record.values() if isinstance(text, str) for c in text):
        raise DataError(f"{place}: half of a surrogate pair is no character: write the text as UTF-8.")
    group: Any = record[columns.group] if columns.group else None
    if isinstance(group, int | float) and not isinstance(group, bool):
        group = None if group != group else str(int(group)) if float(group).is_integer() else group
    group = "" if group is None else group
    others = tuple((name, record[own]) for name, own in zip(fields, columns.fields, strict=True))
    if not all(isinstance(text, str) for text in (group, *(text for _, text in others))):
        names = ", ".join(map(repr, columns.names[2:]))
        raise DataError(f"{place}: what is in the columns {names} must be text (a document may be an integer too).")
    return Pair(source.strip(), target.strip(), group.strip(), others)


def _form(path: Path) -> str | None:
    """The suffix that says a file's format, below that of a compression."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() in _PACKED else path.suffix
    return suffix.lower() if suffix.lower() in _FORMATS else None


def _is_lines(path: Path) -> bool:
    """Whether a file can be one of two with a sentence a line each: text of no other form."""
    if not path.is_file() or _form(path) not in (None, ".txt"):
        return False
    if _form(path) is None:
        return True
    with _open(path) as lines:
        return "\t" not in lines.readline()


def _open(path: Path) -> io.TextIOWrapper:
    """A file's text, unpacked where its name says that it is packed."""
    from fsspec.implementations.local import LocalFileSystem

    try:
        raw = LocalFileSystem().open(str(path.resolve()), "rb", compression="infer")
    except (ValueError, ImportError) as error:
        raise DataError(f"{path}: to unpack it, pip install 'ksl-patch[datasets]' ({error}).") from error
    if path.suffix.lower() in _PACKED:  # which cannot all be read twice
        with raw:
            raw = io.BytesIO(raw.read())
    head = raw.read(4)
    raw.seek(0)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    return io.TextIOWrapper(raw, encoding=encoding, newline="")


def _read_one(where: str, columns: Columns, languages: tuple[str, str] | None, limit: int | None) -> Iterator[_Record]:
    path = Path(where)
    form = _form(path)
    if not path.is_file():
        if form is not None or path.suffix.lower() in _PACKED:
            raise DataError(f"{where}: no such file.")
        return _read_dataset(where, limit)
    if form is None:
        raise DataError(
            f"{where}: the file's name must end in .jsonl, .csv, .tsv or .parquet, so that its format is known; of two "
            "files with a sentence a line each, give both."
        )
    if form == ".parquet":
        return _read_parquet(path)
    if form in (".jsonl", ".json"):
        return _read_json(path)
    return _read_table(path, columns, languages, "," if form == ".csv" else "\t")


def _read_json(path: Path) -> Iterator[_Record]:
    with _open(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("["):
            lines.seek(0)
            try:
                records = json.load(lines)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: not valid JSON ({error}).") from error
            yield from ((f"{path}, item {number}", record) for number, record in enumerate(records, start=1))
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", _Wrong(f"not valid JSON ({error}).")


def _read_table(path: Path, columns: Columns, languages: tuple[str, str] | None, delimiter: str) -> Iterator[_Record]:
    """Rows under a line of names, or source and target."""
    names: list[str] | None = None
    with _open(path) as lines:
        reader = csv.reader(lines) if delimiter == "," else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        begin = 1
        for fields in reader:
            end = reader.line_num
            place = f"{path}, line {begin}" if begin == end else f"{path}, lines {begin} to {end}"
            begin = end + 1
            if not fields:
                continue
            if names is None:
                names = ["source", "target"]
                if _Named(columns, languages).columns(fields) is not None:
                    names = fields
                    continue
                if columns != Columns():
                    expected = ", ".join(map(repr, columns.names))
                    raise DataError(f"{place}: expected a line with the columns' names {expected}, found {fields}.")
                if len(fields) > 1 and all(_names_a_column(text) for text in fields):
                    raise DataError(
                        f"{place}: {', '.join(fields)} look like names of columns: say which has the source and which "
                        f"the target with --columns, or write {delimiter.join(names)!r} in a line before it."
                    )
            if len(fields) == len(names):
                yield place, dict(zip(names, fields, strict=True))
            else:
                between = "comma" if delimiter == "," else "tab"
                what = f"source, {between}, target" if names == ["source", "target"] else f"{len(names)} fields"
                yield place, _Wrong(f"expected {what}; found {len(fields)} fields.")


def _names_a_column(text: str) -> bool:
    import langcodes

    word = text.strip().casefold()
    if word in _NAMES or _is_tag(word):
        return True
    try:
        return bool(langcodes.find(word).language)
    except LookupError:
        return False


def _read_aligned(places: Sequence[str], languages: tuple[str, str] | None) -> Iterator[_Record]:
    """Two files, a sentence a line each. Their names say which is which, where they say a language."""
    paths = [Path(place) for place in places]
    if languages is not None:
        ends = [_language_of(path) for path in paths]
        own = [_of_language(language, [end for end in ends if end]) for language in languages]
        if all(ends) and ends != own:
            if own != ends[::-1]:
                raise DataError(
                    f"{paths[0]} and {paths[1]} are by their names of {ends[0]} and {ends[1]}, and the patch is from "
                    f"{languages[0]} to {languages[1]}."
                )
            paths = paths[::-1]
    counts = [0, 0]
    with _open(paths[0]) as sources, _open(paths[1]) as targets:
        for number, (source, target) in enumerate(zip_longest(sources, targets), start=1):
            counts[0] += source is not None
            counts[1] += target is not None
            if source is None or target is None or not (source.strip() or target.strip()):
                continue
            yield f"{paths[0]} and {paths[1]}, line {number}", {"source": source, "target": target}
    if counts[0] != counts[1]:
        raise DataError(
            f"{paths[0]} has {counts[0]:,} lines and {paths[1]} {counts[1]:,}: lines of the same number are to be a "
            "pair, so these are not each other's translation."
        )


def _language_of(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    name = name.with_suffix("") if name.suffix.lower() == ".txt" else name
    tag = name.suffix.removeprefix(".")
    return tag if tag and _is_tag(tag) else None


def _read_parquet(path: Path) -> Iterator[_Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: to read Parquet, pip install 'ksl-patch[datasets]'.") from error
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}).") from error


def _read_dataset(where: str, limit: int | None) -> Iterator[_Record]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: no such file; to read it as a Hugging Face dataset, pip install 'ksl-patch[datasets]'."
        ) from error

    name, config, split = islice([*where.split(":", 2), None, None], 3)
    assert name is not None
    revision = None
    if not Path(name).exists():
        name, _, revision = name.partition("@")
    streamed = limit is not None and "[" not in (split or "")
    try:
        data = datasets.load_dataset(
            name, config or None, split=split or "train", revision=revision or None, streaming=streamed
        )
        for number, record in enumerate(islice(data, limit), start=1):
            yield f"{where}, row {number}", record
    except Exception as error:  # the library raises many kinds, its own and others'
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: neither a file nor a dataset that can be loaded ({reason}).") from error
