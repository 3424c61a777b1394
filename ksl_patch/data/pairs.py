"""A sentence and its translation: when two are the same, and the digest of many."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from ksl_patch.patch import TemplateMeta


class Pair(NamedTuple):
    """A sentence and its translation.

    group: what it is part of, such as a document; empty for nothing. fields: names and values of what else its
    prompt needs.
    """

    source: str
    target: str
    group: str = ""
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The source by which pairs are the same: without regard to case, white space and compatible characters."""
        return " ".join(unicodedata.normalize("NFKC", self.source).casefold().split())

    def prompt(self, template: TemplateMeta) -> str:
        """The pair's prompt in a template."""
        return template.render(self.source, **dict(self.fields))


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each source, by `Pair.key`, with the same fields."""
    first: dict[tuple[Any, ...], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.key, pair.fields), pair)
    return list(first.values())


def data_digest(pairs: Iterable[Pair]) -> str:
    """sha256 over the pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.source, pair.target, *map(list, pair.fields)]).encode() + b"\n")
    return digest.hexdigest()
