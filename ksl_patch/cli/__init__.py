"""The command line: one file per command, each imported when it is called, and one place for errors."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from ksl_patch import __version__
from ksl_patch.errors import KslPatchError, OtherBodyWarning, OtherVocabularyWarning
from ksl_patch.terminal import visible

_COMMANDS = (
    "add",
    "build",
    "certify",
    "diff",
    "doctor",
    "eval",
    "export",
    "gc",
    "generate",
    "import",
    "inspect",
    "keygen",
    "list",
    "lock",
    "merge",
    "path",
    "pull",
    "push",
    "remove",
    "report",
    "serve",
    "sign",
    "verify",
)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            if near and args[0] not in _COMMANDS:
                raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]}?", ctx) from error
            raise

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        own = f"{name}_" if name in ("import", "list") else name  # Python's own names
        command: click.Command = getattr(import_module(f"ksl_patch.cli.{own}"), own)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ksl-patch")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Embedding patches: teach one language model another language with a handful of embedding rows."""


_others = warnings.showwarning


def _say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning of ours in one line, another's as ever."""
    if issubclass(category, OtherBodyWarning | OtherVocabularyWarning):
        click.echo(f"Warning: {visible(str(message))}", err=True)
    else:
        _others(message, category, *where, **more)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 an error in one line on stderr, 2 wrong usage, 130 interrupted."""
    warnings.showwarning = _say
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        logging.disable(logging.WARNING)  # what libraries say of themselves would drown our one line
    try:
        code = cli.main(arguments, prog_name="ksl-patch", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)  # a command's own exit code, such as verify's 1
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if debug:
            raise
        click.echo("Interrupted. What was finished is kept; the same command continues from there.", err=True)
        sys.exit(130)
    except KslPatchError as error:
        if debug:
            raise
        click.echo(f"Error: {visible(str(error))}", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        click.echo(f"Error: {type(error).__name__}: {visible(reason)} (--debug shows where)", err=True)
        sys.exit(1)
