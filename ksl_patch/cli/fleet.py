"""`ksl-patch build --config`: the patches that a patches.toml says how to build."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ksl_patch.cli.options import TRAIN, kept_run, needing, starting
from ksl_patch.cli.settings import given_in, settings_of

if TYPE_CHECKING:
    from ksl_patch.store.lock import Recipe
    from ksl_patch.train.fleet import Member, Outcome

_EACH = ("base", "pairs", "language", "output", "name")  # what the file says, of all or of each


def build_fleet(
    context: click.Context, config: Path, names: tuple[str, ...], *, force: bool, as_json: bool, ray: str | None,
    ray_cpus: int,
) -> None:  # fmt: skip
    """Build the patches of a file, or those of these names; exit with 1 if one of them failed.

    ray: the address of a cluster where they are built; None for here, one after the other.
    """
    from ksl_patch.store.lock import read_recipes

    for name in _EACH:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is what {config} says: leave it out, or --config.")
    base, recipes = read_recipes(config)
    if unknown := [name for name in names if name not in recipes]:
        raise click.UsageError(f"{config} does not say how to build {unknown[0]!r}: it has {_listed(recipes)}.")
    wanted = {name: recipe for name, recipe in recipes.items() if not names or name in names}
    if not wanted:
        raise click.UsageError(f"{config} has no [patches.NAME] with pairs, so there is nothing to build.")
    settings = {name: _settings(context, config, name, base, recipe) for name, recipe in wanted.items()}

    starting(as_json)
    with needing(TRAIN):
        from ksl_patch.train.config import BuildConfig
        from ksl_patch.train.fleet import Member
        from ksl_patch.train.loaded import launched
    if launched(context.params["device"]).num_processes > 1:
        raise click.UsageError("several processes train one patch together: build those of a file without a launcher.")
    members = [
        Member(
            BuildConfig(**each["config"]),
            wanted[name].file,
            (each["run"] or kept_run(wanted[name].file)).absolute(),
            force,
        )
        for name, each in settings.items()
    ]
    build = None if ray is None else _on_ray(ray, ray_cpus)
    outcomes = _built(members, as_json, build)
    page = _report(config, members, outcomes, as_json)
    _say(config, members, outcomes, page, as_json)
    if any(each.state == "failed" for each in outcomes):
        context.exit(1)


def _settings(context: click.Context, config: Path, name: str, base: str, recipe: Recipe) -> dict[str, Any]:
    """The settings of one patch: the file's, and above them what the command line has."""
    try:
        here = str(Path(base).absolute()) if Path(base).is_dir() else base
        given = {"base": here, "name": name, "language": name} | recipe.options
        arguments = [*_arguments(context.command, given), "--output", str(recipe.file)]
        own = context.command.make_context("build", arguments, parent=context.parent)
        above = given_in(context) - {"more", "config"}
        options = own.params | {key: context.params[key] for key in above}
        run = options.pop("run")
        for key in ("more", "config", "yes", "as_json", "force", "ray", "ray_cpus"):
            options.pop(key)
        return {"config": settings_of(context, options, above | given_in(own)), "run": run}
    except click.UsageError as error:
        raise click.UsageError(f"{config}, patch {name}: {error.format_message()}") from error


def _arguments(command: click.Command, given: dict[str, Any]) -> list[str]:
    """Options of a table as a command line has them. Raises UsageError for what is none."""
    options = {
        text.removeprefix("--"): param
        for param in command.params
        if isinstance(param, click.Option)
        for text in param.opts
        if text.startswith("--") and text not in ("--config", "--output", "--json", "--yes", "--force", "--help")
    }
    found: list[str] = []
    for key, value in given.items():
        option = options.get(key)
        if option is None:
            raise click.UsageError(f"there is no option {key!r}.")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, dict | list) for each in values):
            raise click.UsageError(f"{key} is a value, or a list of values.")
        if option.is_flag:
            if not isinstance(value, bool):
                raise click.UsageError(f"{key} is true or false.")
            if value or option.secondary_opts:
                found.append(f"--{key}" if value else option.secondary_opts[0])
        elif option.nargs != 1:
            found += [f"--{key}", *map(str, values)]
        elif option.multiple or len(values) == 1:
            for each in values:
                # JSON, so that a number stays an id and a text a text.
                found += [f"--{key}", json.dumps(each) if key == "rows" else str(each)]
        else:
            raise click.UsageError(f"{key} takes one value.")
    return found


def _on_ray(address: str, cpus: int) -> Callable[..., list[Outcome]]:
    with needing("--ray needs Ray: pip install 'ksl-patch[ray]'"):
        from ksl_patch.train.fleet_ray import Place, build_on_ray
    return partial(build_on_ray, place=Place(address, cpus))


def _built(
    members: list[Member], as_json: bool, build: Callable[..., list[Outcome]] | None = None
) -> list[Outcome]:  # fmt: skip
    from ksl_patch.terminal import PlainConsole
    from ksl_patch.train import fleet
    from ksl_patch.train.fleet_progress import FleetTable, NamedJson, NamedLines
    from ksl_patch.train.progress import Reporter

    console = PlainConsole(stderr=True)
    table = FleetTable([each.name for each in members], console) if console.is_terminal and not as_json else None

    def reporter_of(member: Member) -> Reporter:
        if table is not None:
            return table.rows[member.name].begins()
        return NamedJson(member.name) if as_json else NamedLines(member.name, console)

    def done(outcome: Outcome) -> None:
        if table is not None:
            table.done(outcome)
        elif outcome.error is not None and not as_json:
            console.print(f"{outcome.name}: failed: {outcome.error}", soft_wrap=True)

    with table or nullcontext():
        return (build or fleet.build_fleet)(members, reporter_of=reporter_of, done=done)


def _report(config: Path, members: list[Member], outcomes: list[Outcome], as_json: bool) -> Path | None:
    """One page of all patches that are there, beside the file; None where it cannot be made."""
    from ksl_patch.errors import KslPatchError
    from ksl_patch.patch import Patch

    built = [member for member, outcome in zip(members, outcomes, strict=True) if outcome.state != "failed"]
    if not built:
        return None
    page = config.with_suffix(".html")
    try:
        from ksl_patch.report.page import AllRows, make_report, write_report

        patches = [Patch.load(member.output) for member in built]
        rows = [AllRows.of(patch, member.run) for patch, member in zip(patches, built, strict=True)]
        write_report(page, make_report(patches, rows))
    except (ImportError, KslPatchError) as error:
        if not as_json:
            click.echo(f"No report was written: {error}", err=True)
        return None
    return page


def _say(config: Path, members: list[Member], outcomes: list[Outcome], page: Path | None, as_json: bool) -> None:
    """What became of each."""
    if as_json:
        for member, outcome in zip(members, outcomes, strict=True):
            values = {
                "event": "failed" if outcome.state == "failed" else "patch", "patch": outcome.name,
                "path": str(member.output), "digest": outcome.digest, "rows": outcome.rows,
                "loss_base": outcome.loss_base, "loss_patch": outcome.loss_patch, "seconds": outcome.seconds,
                "unchanged": outcome.state == "unchanged", "message": outcome.error,
            }  # fmt: skip
            print(json.dumps(values, ensure_ascii=False))
        print(json.dumps({"event": "fleet", "report": page and str(page)}))
        return
    from ksl_patch.terminal import PlainConsole
    from ksl_patch.train.fleet_progress import outcome_cells, outcome_table

    console = PlainConsole(width=None if PlainConsole().is_terminal else 140)
    table = outcome_table(f"{config}: {len(outcomes)} patches")
    for outcome in outcomes:
        table.add_row(*outcome_cells(outcome))
    console.print(table)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        console.print(f"{outcome.name}: {outcome.error}", soft_wrap=True)
    if page is not None:
        console.print(f"Wrote {page}, with all of them.", soft_wrap=True)
    if failed:
        again = " ".join(outcome.name for outcome in failed)
        console.print(f"{len(failed)} failed: `ksl-patch build --config {config} {again}` goes on.", soft_wrap=True)


def _listed(recipes: dict[str, Recipe]) -> str:
    shown = ", ".join(list(recipes)[:8])
    return (f"{shown}, ..." if len(recipes) > 8 else shown) or "none"
