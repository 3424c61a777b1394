"""The options of `ksl-patch build` as the settings of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

AUTO = "auto"  # of --steps
MOST_STEPS = 1000  # of a tuning that stops by itself

# KS-Lottery's own, as others report them: the paper's prompt and batch are not published. Its embedding tuning has a
# learning rate of 2e-5 in 3 epochs, its partial tuning 1e-2 in 5, of 10,000 pairs; batch, schedule, warm-up and prompt
# are those of a project of the same group.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "absolute_lr": True, "embed_lr": 2e-5, "embed_epochs": 3.0, "lr": 1e-2, "epochs": 5.0, "schedule": "cosine",
        "warmup": 0.03, "batch_size": 8, "accumulate": 16, "damp_rare": False, "max_pairs": 10_000,
        "template": "alpaca",
    },
}  # fmt: skip


class Steps(click.ParamType[Any]):
    """A number of steps, or `AUTO`."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or `AUTO`."""
        if value == AUTO:
            return AUTO
        try:
            return click.IntRange(1).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a number of steps, 1 or more, nor {AUTO!r}.", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """`AUTO`, where it may become that."""
        return [CompletionItem(AUTO)] if AUTO.startswith(incomplete) else []


def given_in(context: click.Context) -> set[str]:
    """The names of the options that somebody gave."""
    return {name for name in context.params if context.get_parameter_source(name) != ParameterSource.DEFAULT}


def settings_of(context: click.Context, options: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The fields of a BuildConfig from the command's options. Raises UsageError for those that do not go together.

    given: the names of those that count above a preset.
    """
    for param in context.command.params:
        if param.name in ("base", "pairs", "language", "output") and not options[param.name]:
            raise click.MissingParameter(ctx=context, param=param)
    options = dict(options)
    for key, value in PRESETS.get(options.pop("preset"), {}).items():
        if key not in given:
            options[key] = value
    for steps, epochs in (("steps", "epochs"), ("embed_steps", "embed_epochs")):
        if options[epochs] is not None and steps in given:
            if epochs in given:
                name = steps.replace("_", "-")
                raise click.UsageError(f"--{name} and --{epochs.replace('_', '-')} say the same: give one of the two.")
            options[epochs] = None
    auto = options["steps"] == AUTO
    if "validation" in given and not auto:
        raise click.UsageError("--validation is for --steps auto, which stops by these pairs.")
    if auto:
        if options["mode"] == "transfer":
            raise click.UsageError("--steps auto ends the rows' own tuning, and --mode transfer has none.")
        for name in ("schedule", "warmup"):
            if name in given and (options["rows"] or options["selection"] not in ("ks", "l2")):
                raise click.UsageError(f"--{name} plans the steps, and --steps auto has none to plan: leave out one.")
        options |= {"steps": MOST_STEPS, "auto_steps": True}
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
    if options["alpha"] is not None and options["selection"] not in ("ks", "single"):
        raise click.UsageError(f"--alpha is a level of the KS test, and --selection {options['selection']} has none.")
    places = options["template"] == "soft" or "{reserved" in options["template"] + (options["system"] or "")
    if places and (options["selection"] != "reserved" or options["rows"]):
        raise click.UsageError(
            "{reserved} in a template, and --template soft, are places of reserved rows: add --selection reserved "
            "--top-k K."
        )
    if options["rows"]:
        others = [name for name in ("alpha", "top_k") if options[name] is not None]
        if others or options["selection"] != "ks":
            other = others[0].replace("_", "-") if others else "selection"
            raise click.UsageError(f"--rows names the rows, and --{other} chooses them: give one of the two.")
    if options["alpha"] is None and options["top_k"] is None:
        del settings["alpha"]  # the configuration's own
    settings["name"] = options["name"] or output.stem
    return settings
