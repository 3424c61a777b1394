"""The options of `ksl-patch build` as the settings of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def settings_of(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a BuildConfig from the command's options. Raises UsageError for those that do not go together."""
    for param in context.command.params:
        if param.name in ("base", "pairs", "language", "output") and not options[param.name]:
            raise click.MissingParameter(ctx=context, param=param)
    settings = dict(options)
    output: Path = settings.pop("output")
    if options["selection"] == "single" and (options["alpha"], options["top_k"]) != (None, None):
        raise click.UsageError("--selection single takes one row: leave out --alpha and --top-k.")
    if options["selection"] not in ("ks", "single") and options["top_k"] is None:
        raise click.UsageError(
            f"--selection {options['selection']} needs --top-k: nothing else says how many rows to take."
        )
    if options["selection"] != "reserved" and (options["beside"] or options["start"] != "text"):
        raise click.UsageError("--beside and --start are for reserved rows: add --selection reserved --top-k K.")
    if options["rows"]:
        others = [name for name in ("alpha", "top_k") if options[name] is not None]
        if others or options["selection"] != "ks":
            other = others[0].replace("_", "-") if others else "selection"
            raise click.UsageError(f"--rows names the rows, and --{other} chooses them: give one of the two.")
    if options["alpha"] is None and options["top_k"] is None:
        del settings["alpha"]  # the configuration's own
    settings["name"] = options["name"] or output.stem
    return settings
