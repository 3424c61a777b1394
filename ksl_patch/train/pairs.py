"""A sentence and its translation."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

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
