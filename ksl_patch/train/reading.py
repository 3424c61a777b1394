"""Sentence pairs as the world keeps them: lines, tables, aligned files, Hugging Face datasets."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ksl_patch.errors import DataError
from ksl_patch.train.pairs import Pair

_SHOWN = 10
_FORMATS = (".jsonl", ".json", ".tsv", ".txt", ".csv", ".parquet")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What files call their columns, beside languages: as a first line, hardly a pair.
_SOURCES = frozenset(["source", "src", "prompt", "input", "query", "question", "original"])
_TARGETS = frozenset(["target", "tgt", "trg", "completion", "output", "response", "answer", "translation", "reference"])
_NAMES = _SOURCES | _TARGETS | {"text", "texte", "texto", "sentence", "sent", "mt", "ref", "id", "quelle", "quelltext"}
_NAMES |= {"ausgangstext", "ziel", "zieltext", "origen", "destino", "fuente", "cible", "traduction"}
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
_LONGEST_ROW = 100  # lines: a quote that nobody closes makes one row of the rest of a file
csv.field_size_limit(1 << 27)

Languages = tuple[str | None, str | None]


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
    named, pairs, what = _Named(columns, languages), [], ", ".join(places)
    if not columns.by_default and any(map(_says_no, columns[:2], languages)):
        raise DataError(
            f"the columns are {columns.source} and {columns.target}, and the pairs are to be from {languages[0]} to "
            f"{languages[1]}: --columns names the source first."
        )
    try:
        for place, record in _records(places, columns, languages, limit):
            try:
                if isinstance(record, _Wrong):
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


class _Wrong(str):
    """Why a place holds no record."""


# A place in words, and what is there: values by column, if it is a pair.
_Record = tuple[str, Any]


def _records(places: list[str], columns: Columns, languages: Languages, limit: int | None) -> Iterable[_Record]:
    paths = [Path(place) for place in places]
    of_lines = list(map(_is_lines, paths)) if len(paths) == 2 else [False]
    if all(of_lines):
        if columns != Columns():
            raise DataError(f"{paths[0]} and {paths[1]} are lines of text and have no columns.")
        return _read_aligned(paths, languages)
    if any(of_lines):
        for path in paths:
            if not path.exists():
                raise DataError(f"{path}: no such file.")
    return chain.from_iterable(_read_one(place, columns, languages, limit) for place in places)


class _Named:
    """Which columns hold what, found for each set of names once. messages, others: whether such records came."""

    def __init__(self, columns: Columns, languages: Languages) -> None:
        self._columns, self._languages = columns, languages
        self._known: dict[tuple[Any, ...], Columns | None] = {}
        self.messages = self.others = False

    def columns(self, names: Sequence[Any]) -> Columns | None:
        """The columns by the names that they have here; None where one is missing."""
        key = tuple(names)
        if key not in self._known:
            self._known[key] = self._find(key)
        return self._known[key]

    def _find(self, names: tuple[Any, ...]) -> Columns | None:
        wanted = self._columns
        found = {name: _called(name, names) for name in wanted.names}
        if wanted.by_default and not (found["source"] and found["target"]) and None not in self._languages:
            for name, language in zip(("source", "target"), self._languages, strict=True):
                found[name] = _of_language(str(language), names)
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
        columns = None
        if isinstance(inner, dict):  # as OPUS sets have it
            others = {name: value for name, value in record.items() if name not in ("source", "target")}
            columns = self.columns([*others, *inner])
            record = {**(others if columns else record), **inner}
        columns = columns or self.columns(list(record))
        if columns is None and self._columns.by_default and isinstance(record.get("messages"), list):
            record, columns = record | _turns(record["messages"], place), self._columns
            self.messages = True
        else:
            self.others = True
        if columns is None or not set(columns.names) <= record.keys():
            expected = ", ".join(map(repr, self._columns.names))
            raise DataError(f"{place}: expected the columns {expected}, found {sorted(map(str, record))}.")
        return _pair(record, columns, self._columns.fields, place)


def _called(name: str, names: Sequence[Any]) -> str | None:
    """The one of `names` that is this one, if need be in another case."""
    alike = [other for other in names if other == name] or [
        other for other in names if isinstance(other, str) and other.strip().casefold() == name.casefold()
    ]
    return alike[0] if len(alike) == 1 else None


def _of_language(tag: str, names: Sequence[Any]) -> str | None:
    """The one of `names` that is this language's tag, or says less or more of it: "pt" or "pt-Latn-BR" for "pt-BR"."""
    exact = [name for name in names if isinstance(name, str) and _agree(tag, name, exactly=True)]
    near = [name for name in names if isinstance(name, str) and _agree(tag, name)]
    found = exact or near
    return found[0] if len(found) == 1 else None


def _agree(tag: str, other: str, *, exactly: bool = False) -> bool:
    """Whether two tags can be of one language, in one script and region as far as both say them."""
    import langcodes

    if not (_is_tag(tag) and _is_tag(other)):
        return False
    one, two = (langcodes.get(each.strip().replace("_", "-")).prefer_macrolanguage() for each in (tag, other))
    if exactly:
        return bool(one.to_tag() == two.to_tag())
    scripts = [each.script or (each.maximize().script if each.territory else None) for each in (one, two)]
    bokmal = {"nb": "no"}
    languages = [bokmal.get(each.language, each.language) for each in (one, two)]
    pairs = (languages, scripts, [one.territory, two.territory])
    return all(a == b or (a is None or b is None) for a, b in pairs)


def _is_tag(text: str) -> bool:
    import langcodes

    text = text.strip().replace("_", "-")
    return bool(re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}", text)) and bool(langcodes.tag_is_valid(text))


def _turns(messages: list[Any], place: str) -> dict[str, Any]:
    """The two turns of a chat as source and target."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != ["user", "assistant"]:
        more = ": give a system message that all have with --system" if roles[:1] == ["system"] else ""
        raise DataError(f"{place}: expected messages of a user and an assistant, found {roles}{more}.")
    return {"source": messages[0].get("content"), "target": messages[1].get("content")}


def _pair(record: dict[str, Any], columns: Columns, fields: Sequence[str], place: str) -> Pair:
    source, target = record[columns.source], record[columns.target]
    if not all(isinstance(text, str) and text.strip() for text in (source, target)):
        raise DataError(f"{place}: source and target must both be text that is not empty.")
    if "\0" in source + target:
        raise DataError(f"{place}: there is a NUL in the text: save the file as UTF-8.")
    if any(0xD800 <= ord(c) < 0xE000 for text in record.values() if isinstance(text, str) for c in text):
        raise DataError(f"{place}: half of a surrogate pair is no character: write the text as UTF-8.")
    group: Any = record[columns.group] if columns.group else None
    if isinstance(group, float):
        group = None if group != group else str(int(group)) if group.is_integer() else group
    elif isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    group = "" if group is None else group
    others = tuple((name, record[own]) for name, own in zip(fields, columns.fields, strict=True))
    if not all(isinstance(text, str) for text in (group, *(text for _, text in others))):
        names = ", ".join(map(repr, columns.names[2:]))
        raise DataError(f"{place}: what is in the columns {names} must be text (a document may be an integer too).")
    return Pair(source.strip(), target.strip(), group.strip(), others)


def _unpack_zst(content: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("to unpack .zst, pip install 'ksl-patch[datasets]'.") from error
    parts = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(content))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("it ends early")
        content = frame.unused_data
    return b"".join(parts)


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unpack_zst,
}


def _form(path: Path) -> str | None:
    """The suffix that says a file's format, below that of a compression."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() in _UNPACK else path.suffix
    return suffix.lower() if suffix.lower() in _FORMATS else None


def _is_lines(path: Path) -> bool:
    """Whether a file can be one of two with a sentence a line each: text of no other form."""
    if not path.is_file() or _form(path) not in (None, ".txt"):
        return False
    try:
        return _form(path) is None or "\t" not in _text(path).partition("\n")[0]
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _text(path: Path) -> str:
    """A file's text, unpacked where its name says that it is packed."""
    content = path.read_bytes()
    if unpack := _UNPACK.get(path.suffix.lower()):
        try:
            content = unpack(content)
        except ValueError as error:  # bz2's
            raise EOFError(str(error)) from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: cannot be read as UTF-8 text: save it as UTF-8 (of Excel's forms, CSV UTF-8), or "
            f"convert it, as in `iconv -f cp1252 -t utf-8 {path.name}`."
        ) from error


def _lines(path: Path) -> list[str]:
    """A text's lines. Only a line feed ends one, so that files of as many lines stay aligned."""
    return [line.removesuffix("\r") for line in _text(path).split("\n")]


def _read_one(where: str, columns: Columns, languages: Languages, limit: int | None) -> Iterator[_Record]:
    path = Path(where)
    form = _form(path)
    if not path.is_file():
        local = path.is_absolute() or (len(path.parts) > 1 and path.parent.is_dir() and not path.exists())
        if form is not None or path.suffix.lower() in _UNPACK or (local and not path.is_dir() and ":" not in where):
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
    return _under_names(path, columns, languages, _csv(path) if form == ".csv" else _tsv(path))


def _read_json(path: Path) -> Iterator[_Record]:
    lines = _lines(path)
    text, first = "\n".join(lines).strip(), next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}).") from error
        yield from ((f"{path}, item {number}", record) for number, record in enumerate(records, start=1))
        return
    if first.strip() == "{" or path.suffix.lower() == ".json":
        whole = None
        with suppress(ValueError, RecursionError):
            whole = json.loads(text)
        if isinstance(whole, dict) and "\n" in text:
            names = ", ".join(map(str, whole))
            raise DataError(f"{path}: one object ({names}): expected an array, or an object a line.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{path}, line {number}", _Wrong(f"not valid JSON ({error}).")


# A place in words, a row's fields or why it has none, and the name of what separates them.
_Row = tuple[str, "list[str] | _Wrong", str]


def _tsv(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line:
            # Quotes are text here, but for those that a writer of tables doubled.
            fields = [text[1:-1].replace('""', '"') if _QUOTED.fullmatch(text) else text for text in line.split("\t")]
            yield f"{path}, line {number}", fields, "tab"


def _csv(path: Path) -> Iterator[_Row]:
    """Rows of a table. A row with a wrong quote is one line; those behind it are read as ever."""
    lines, first = io.StringIO(_text(path), newline="").readlines(), 0
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
                yield f"{path}, line {begin}", _Wrong(reason), name
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


def _under_names(path: Path, columns: Columns, languages: Languages, rows: Iterator[_Row]) -> Iterator[_Record]:
    """Rows as records under a line of names, or of source and target."""
    names: list[str] | None = None
    for place, fields, separator in rows:
        if isinstance(fields, _Wrong):
            yield place, fields
            continue
        if names is None:
            names = ["source", "target"]
            found = _Named(columns, languages).columns(fields)
            if found is not None:
                names = fields
                continue
            if columns != Columns():
                expected = ", ".join(map(repr, columns.names))
                raise DataError(f"{place}: expected a line with the columns' names {expected}, found {fields}.")
            if len(fields) > 1 and _are_names(fields):
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
            yield place, _Wrong(f"expected {what}; found {len(fields)} fields{more}.")


def _are_names(fields: list[str]) -> bool:
    """Whether a first line reads as names of columns, as "src", "text_en" or "English", and as no pair of sentences."""
    named = [_named(text) for text in fields]
    # "French" and "Francés" are a pair.
    return None not in named and len(set(named)) == len(named)


def _named(text: str) -> str | None:
    """What a text names as a column does: a side, or a language; None for a sentence."""
    import langcodes

    word = text.strip().casefold()
    parts = [part for part in re.split(r"[_\W]+", word) if part]
    rest = [part for part in parts if part.rstrip("0123456789") not in _NAMES]
    if not rest:
        return word or None
    if _is_tag("-".join(rest)) and (len(rest) > 1 or len(rest[0]) == 2 or len(rest) < len(parts)):
        return "-".join(rest)
    try:
        return str(langcodes.find(rest[0]).language) if rest[0].isalpha() and len(rest) < 3 else None
    except LookupError:
        return None


def _read_aligned(paths: list[Path], languages: Languages) -> Iterator[_Record]:
    """Two files, a sentence a line each. Their names say which is which, where they say a language or a side."""
    if _is_swapped(paths, languages):
        paths = paths[::-1]
    texts = []
    for path in paths:
        lines = _lines(path)
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
    if ends[0].casefold() in _TARGETS and ends[1].casefold() in _SOURCES:
        return True
    # Of each file for each side: of this language, of another one, or nothing that says a language.
    says = [[_says(end, language) for language in languages] for end in ends]
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


def _says(end: str, language: str | None) -> bool | None:
    """Whether a file's ending is of a language; None where it is hardly one's tag."""
    if language is None:
        return None
    if _agree(language, end):
        return True
    return False if (len(end) == 2 or re.search("[-_]", end)) and _is_tag(end) else None


def _says_no(end: str, language: str | None) -> bool:
    return _says(end, language) is False


def _end(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in _UNPACK else path
    name = name.with_suffix("") if name.suffix.lower() == ".txt" else name
    return name.suffix.removeprefix(".") or name.name


def _read_parquet(path: Path) -> Iterator[_Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: to read Parquet, pip install 'ksl-patch[datasets]'.") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except Exception as error:  # the library raises many kinds, its own and Python's
        raise DataError(f"{path}: not a Parquet file that can be read, after row {number} ({error}).") from error


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
        records = list(islice(data, limit))
    except Exception as error:  # the library raises many kinds, its own and others'
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: neither a file nor a dataset that can be loaded ({reason}).") from error
    yield from ((f"{where}, row {number}", record) for number, record in enumerate(records, start=1))
