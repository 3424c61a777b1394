"""Which columns of a table hold what, and the pair of a record; reading them is records.py's and delimited.py's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ksl_patch.data.languages import Languages, agree, is_tag
from ksl_patch.data.pairs import Pair
from ksl_patch.errors import DataError

# What files call their columns, beside languages: as a first line, hardly a pair.
SOURCES = frozenset(["source", "src", "prompt", "input", "query", "question", "original"])
TARGETS = frozenset(["target", "tgt", "trg", "completion", "output", "response", "answer", "translation", "reference"])
_NAMES = SOURCES | TARGETS | {"text", "texte", "texto", "sentence", "sent", "mt", "ref", "id", "quelle", "quelltext"}
_NAMES |= {"ausgangstext", "ziel", "zieltext", "origen", "destino", "fuente", "cible", "traduction"}


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


class Naming:
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
    exact = [name for name in names if isinstance(name, str) and agree(tag, name, exactly=True)]
    near = [name for name in names if isinstance(name, str) and agree(tag, name)]
    found = exact or near
    return found[0] if len(found) == 1 else None


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


def are_names(fields: list[str]) -> bool:
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
    if is_tag("-".join(rest)) and (len(rest) > 1 or len(rest[0]) == 2 or len(rest) < len(parts)):
        return "-".join(rest)
    try:
        return str(langcodes.find(rest[0]).language) if rest[0].isalpha() and len(rest) < 3 else None
    except LookupError:
        return None
