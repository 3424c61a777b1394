"""The patches that `ksl-patch serve` is given: found, checked against the base, and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ksl_patch.errors import BaseMismatchError, RunError
from ksl_patch.terminal import PlainConsole

if TYPE_CHECKING:
    from ksl_patch.patch import Patch

    Served = tuple[str, str, Patch | None, int]  # name, the path that vLLM reads, the patch if it is one, its rows


def check_base(base: str, names: list[str], served: list[Served]) -> None:
    """Raise where the patches cannot be of the base, or a request could not tell one of them from it.

    names: what the base answers to.
    """
    from ksl_patch.base.weight_files import table_in_files

    folder = Path(base)
    remote = "://" in base or base.endswith(".gguf")  # storage, or a file of a repository, which vLLM takes too
    is_path = folder.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1
    if is_path and not remote and not folder.exists():
        raise RunError(f"there is no folder {base}.")
    of: dict[tuple[int, int], str] = {}
    table = table_in_files(folder)
    for name, _, patch, _ in served:
        if name in names:
            raise RunError(f"a patch is called {name}, as the base is: give it another name, as in --patch NAME=PATH.")
        if patch is None:
            continue
        of.setdefault((patch.meta.base.vocab_size, patch.meta.base.hidden_size), name)
        try:
            if table is not None:
                patch.check_table(table)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{name}: {error}") from error
    if len(of) > 1:
        one, other = list(of.values())[:2]
        raise RunError(f"{one} and {other} are of different bases, and one server has one.")


def read_patches(patches: tuple[str, ...], key: Path | None) -> list[Served]:
    """What `--patch` names."""
    from ksl_patch.interop import peft
    from ksl_patch.patch.names import check_name, is_name
    from ksl_patch.store.local import Store
    from ksl_patch.store.references import resolve, stored_name
    from ksl_patch.store.sign import PublicKey, load_signed

    public = None if key is None else PublicKey.load(key)
    served: list[Served] = []
    store = Store()
    entry: Served
    for given in patches:
        name, found, reference = given.partition("=")
        # A path may have "=" in it too.
        if not found or Path(given).exists() or not (is_name(name) or Path(reference).exists()):
            name, reference = "", given
        is_folder = Path(reference).is_dir()
        is_adapter = is_folder and stored_name(reference) is None
        if is_folder and not is_adapter:
            click.echo(f"{reference} is the store's patch of that name; ./{reference} is the folder.", err=True)
        if public is not None and is_adapter:
            raise RunError(f"{reference} is a folder, and only patch files can be signed.")
        if is_adapter:
            ids = peft.read_trainable_tokens(Path(reference), tied=False).token_ids
            entry = (name or Path(reference).name, str(Path(reference).resolve()), None, 2 * len(ids))
        else:
            file, patch, stored = resolve(reference)
            if public is not None:
                patch = load_signed(file, public)
            count = len(patch.token_ids) * (1 if patch.output_rows is None else 2)
            own = name or stored or patch.meta.name
            entry = (own, str(store.add(patch).resolve()), patch, count)
        if check_name(entry[0]) in [other for other, *_ in served]:
            raise RunError(f"two patches are called {entry[0]}: give one another name, as in --patch NAME=PATH.")
        served.append(entry)
    return served


def other_languages(served: list[Served]) -> dict[str, str | None]:
    """The languages of patches that the store says otherwise of: it has one description for equal rows."""
    from ksl_patch.patch import Patch

    return {
        f"{name}@{patch.digest}": patch.meta.language
        for name, path, patch, _ in served
        if patch is not None and Patch.load(path).meta.language != patch.meta.language
    }


def show(base: str, served: list[Served]) -> None:
    """A table of what is served."""
    table = Table(title=f"Serving {base}", title_justify="left", caption="the base itself is served by its own name")
    for column in ("model", "language", "rows", "digest", "template"):
        table.add_column(column, no_wrap=column in ("rows", "digest"), overflow="fold")
    for name, path, patch, _ in served:
        if patch is None:
            table.add_row(name, "", "", path, "")
        else:
            template = patch.meta.template
            shown = "" if template is None else "chat" if template.chat else template.text.strip().splitlines()[0]
            language = patch.meta.language or ""
            table.add_row(name, language, str(len(patch.token_ids)), patch.digest[:12], shown)
    PlainConsole(stderr=True).print(table)
