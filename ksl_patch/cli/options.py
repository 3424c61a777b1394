"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.errors import PatchError

if TYPE_CHECKING:
    from ksl_patch.patch import Patch
    from ksl_patch.store.local import Store


def check_free(store: Store, name: str, patch: Patch, force: bool) -> str:
    """What a name of the store was of, in words; empty where that is nothing or this patch.

    Raises UsageError where it was of a patch of another base or language, without `force`.
    """
    before = store.digest(name)
    if before in (None, patch.digest):
        return ""
    with suppress(PatchError):
        old, new = store.get(str(before)).meta, patch.meta
        if not force and (old.base.fingerprint, old.language) != (new.base.fingerprint, new.language):
            what = f"{old.language or 'no language'} on {old.base.model_id or 'a base'}"
            raise click.UsageError(
                f"the store's name {name} is of another patch ({what}, {str(before)[:12]}): give --name, or --force to "
                "move the name."
            )
    return f", was {str(before)[:12]}"


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
