"""What several commands share: options, the kinds of values that a shell completes, and checks before they begin."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from ksl_patch.errors import PatchError

if TYPE_CHECKING:
    from ksl_patch.patch import Patch
    from ksl_patch.store.local import Store


class _Outside(StringParamType):
    """A text that may name a file: a base or a data set is a path or an id on the Hub. A shell completes the path."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class _StoredName(StringParamType):
    """A name of the local store."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ksl_patch.store.root import stored_names

        return [CompletionItem(name) for name in stored_names() if name.startswith(incomplete)]


class _Reference(_Outside):
    """A patch: a path, a name or digest of the local store, or hf://ORG/REPO/FILE. A shell completes the first two."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = STORED_NAME.shell_complete(ctx, param, incomplete)
        # bash takes files or words, never both, so beside names files are words.
        return _words(names, incomplete) if names else super().shell_complete(ctx, param, incomplete)


class _NamedReference(_Reference):
    """NAME=P, or P."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        name, equals, rest = incomplete.partition("=")
        if not equals:  # or in bash, which cuts words there
            return super().shell_complete(ctx, param, incomplete)
        found = _words(STORED_NAME.shell_complete(ctx, param, rest), rest)
        return [CompletionItem(f"{name}={item.value}") for item in found]


def _words(names: list[CompletionItem], incomplete: str) -> list[CompletionItem]:
    """Names, and the files and folders that begin so; but for those that a shell would not take as one plain word."""
    folder, slash, start = incomplete.rpartition("/")
    where = Path(folder or slash or ".")
    here = where.iterdir() if where.is_dir() else ()
    files = [f"{each.name}/" if each.is_dir() else each.name for each in here if each.name.startswith(start)]
    plain = [file for file in files if (start or file[0] != ".") and re.fullmatch(r"[\w.+,@%/-]+", file)]
    found = {f"{folder}{slash}{file}" for file in plain}
    return [CompletionItem(each) for each in sorted({*found, *(name.value for name in names)})]


PATH_OR_ID = _Outside()
STORED_NAME = _StoredName()
REFERENCE = _Reference()
NAMED_REFERENCE = _NamedReference()


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def json_option(help: str = "Print one JSON object.") -> Decorator:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def base_option(help: str, *, required: bool = False) -> Decorator:
    """`--base M`: a model's folder or id."""
    return click.option("--base", required=required, metavar="M", type=PATH_OR_ID, help=help)


def revision_option() -> Decorator:
    """`--revision` of the base."""
    return click.option("--revision", metavar="REV", help="Revision of the base on the Hub.")


def device_option(what: str = "Where to run.") -> Decorator:
    """`--device`."""
    return click.option("--device", metavar="DEV", help=f"{what}  [default: cuda when there is one, else cpu]")


def force_option(help: str) -> Decorator:
    """`--force`."""
    return click.option("--force", is_flag=True, help=help)


def output_option(metavar: str, help: str, *, required: bool = False) -> Decorator:
    """`-o FILE`."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("-o", "--output", required=required, metavar=metavar, type=kind, help=help)


def new_patch_options(metavar: str, *, required: bool = True) -> Decorator:
    """`-o`, `--force` and `--name` of a command that makes a patch."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        name = click.option("--name", metavar="NAME", help="Name of the patch; by default the output file's.")
        named = force_option("Replace an existing patch.")(name(command))
        what = "Patch to write." if required else "Patch to write.  [required]"
        return output_option(metavar, what, required=required)(named)

    return decorate


@contextmanager
def needing(what: str) -> Iterator[None]:
    """A `with` block of imports that an extra brings. what: who needs it, and how it is installed."""
    try:
        yield
    except ImportError as error:
        raise click.ClickException(f"{what} ({error}).") from error


TRAIN = "building needs the train extra: pip install 'ksl-patch[train]'"


def check_output(output: Path, force: bool) -> None:
    """Raise UsageError, before anything is computed, where a file cannot be written, or would be replaced."""
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; add --force to replace it, or choose another name.")
    if not output.parent.is_dir():
        raise click.UsageError(f"the folder {output.parent} does not exist.")


def kept_run(patch: Path, digest: str | None = None) -> Path:
    """The folder that the build of a patch kept, where nobody names it.

    digest: of the patch, whose record may be in the folder of others beside it: P.run goes first.
    """
    own = patch.with_name(f"{patch.name}.run")
    if digest is None or own.is_dir():
        return own
    others = sorted(patch.parent.glob(f"*.run/patch-{digest[:16]}.json"))
    return others[0].parent if others else own


def base_model_option() -> Decorator:
    """`--base-model ID`."""
    what = "The base's id on the Hub, for the patch, where --base is a folder."
    return click.option("--base-model", metavar="ID", help=what)


def starting(as_json: bool) -> None:
    """Say that a command has begun, before libraries are imported, which takes seconds."""
    if not as_json and not int(os.environ.get("RANK", 0)):
        click.echo("Loading torch and transformers ...", err=True)


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


def columns_option(help: str) -> Decorator:
    """`--columns S,T`, the names of the two columns of sentence pairs, as a tuple."""

    def two(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        both = tuple(part.strip() for part in value.split(","))
        if len(both) != 2:
            raise click.UsageError("--columns takes two names with a comma between them.")
        return both

    return click.option("--columns", default="source,target", metavar="S,T", callback=two, help=help)
