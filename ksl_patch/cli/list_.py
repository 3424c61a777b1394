"""`ksl-patch list`: what the local store has."""

from __future__ import annotations

import json

import click
from rich.table import Table

from ksl_patch.cli.options import json_option
from ksl_patch.terminal import PlainConsole


@click.command("list")
@json_option("Print a JSON line for each patch.")
def list_(as_json: bool) -> None:
    """List the patches of the local store with their names."""
    from ksl_patch.errors import PatchError
    from ksl_patch.store.local import Store

    store = Store()
    caption = "digest: of what a patch does; `ksl-patch words digest`"
    table = Table(title=f"{store.root}", title_justify="left", caption=caption, caption_justify="left")
    for column in ("name", "language", "rows", "bytes", "base", "digest"):
        is_text = column in ("name", "language", "base")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for entry in store.entries():
        found = {"names": list(entry.names), "digest": entry.digest, "bytes": entry.nbytes}
        try:
            patch = store.get(entry.digest)
        except PatchError as error:
            found |= {"damaged": str(error)}
            row = (", ".join(entry.names), "", "", f"{entry.nbytes:,}", "damaged: delete it and add it again")
        else:
            meta = patch.meta
            found |= {"language": meta.language, "rows": len(patch.token_ids), "base": meta.base.model_id}
            rows, base = str(len(patch.token_ids)), meta.base.model_id or ""
            row = (", ".join(entry.names), meta.language or "", rows, f"{entry.nbytes:,}", base)
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=False))
        table.add_row(*row, entry.digest[:12])
    if not as_json:
        PlainConsole().print(table)
