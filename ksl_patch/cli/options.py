"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def one_or_several(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> str | tuple[str, ...] | None:
    """A repeated option's value: none, one, or all."""
    return values if len(values) > 1 else values[0] if values else None


def columns_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--columns S,T`, the names of the two columns of sentence pairs, as a tuple."""

    def two(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        both = tuple(part.strip() for part in value.split(","))
        if len(both) != 2:
            raise click.UsageError("--columns takes two names with a comma between them.")
        return both

    return click.option("--columns", default="source,target", metavar="S,T", callback=two, help=help)
