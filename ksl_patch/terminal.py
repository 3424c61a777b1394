"""What is printed: text from outside shown as text and nothing else, and numbers of things in words."""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

# Which may hide or reorder others, or end a line.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


class PlainConsole(Console):
    """Rich's, to which `[bold]`, `[/INST]` and `:smile:` are text; what moves a cursor is shown as its code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        r"""Text as it is written, but for control characters: `\x1b` in place of an escape."""
        return super().render_str(visible(text), **options)


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number of things: "1 row", "1,200 rows"; things: the plural, where it is not with an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def visible(text: str) -> str:
    r"""The text with control characters, and those that change its direction, as `\x1b` and `\u202e`."""
    return "".join(
        repr(c)[1:-1] if c in _DIRECTIONS or (unicodedata.category(c) == "Cc" and c not in "\n\t") else c for c in text
    )
