"""The command line: one file per command, each imported when it is called, and one place for errors."""

from __future__ import annotations

import difflib
import json
import logging
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from ksl_patch import __version__
from ksl_patch.errors import KslPatchError, OtherBodyWarning, OtherVocabularyWarning
from ksl_patch.terminal import visible

_SECTIONS = {
    "Make a patch": {
        "build": "from a base model and sentence pairs",
        "merge": "one patch of two for the same base",
        "import": "from PEFT's adapter with trained tokens",
    },
    "Judge it": {
        "inspect": "its rows as tokens, its base, its training",
        "eval": "figures on held-out pairs, beside the base and controls",
        "certify": "how far it agrees with the tuned embedding",
        "report": "one HTML page about a patch, or comparing several",
        "diff": "what two patches of one base change",
    },
    "Answer with it": {
        "generate": "completions, another patch for every prompt of a batch",
        "serve": "vLLM's OpenAI server, another patch for every request",
        "lock": "write down which patches a server is to serve",
    },
    "Keep it": {
        "add": "put patch files into the local store",
        "list": "the patches of the local store and their names",
        "path": "the file of a name or digest",
        "remove": "forget a name",
        "gc": "delete the patches that have no name",
    },
    "Share it": {
        "push": "to the Hugging Face Hub, with a model card",
        "pull": "from the Hub into the local store",
        "export": "as an adapter for PEFT, or for vLLM without this package",
        "keygen": "a key pair to sign patches with",
        "sign": "a signature beside a patch file",
        "verify": "is it sound, of this base, signed with this key?",
    },
    "Help": {
        "doctor": "what this machine has, and what to do about the rest",
        "words": "what ticket, slot, side, scope, D and other words mean",
    },
}
_COMMANDS = tuple(name for commands in _SECTIONS.values() for name in commands)
_RESUMED = ("build", "eval", "certify")
_INTERRUPTED = 130


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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by what they are for."""
        for section, commands in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(f"{name:<8}", what) for name, what in commands.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ksl-patch")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Embedding patches: teach one language model another language with a handful of embedding rows.

    \b
    To begin with:
      ksl-patch doctor
      ksl-patch build --base M --pairs F --language L -o P
      ksl-patch eval P
      ksl-patch generate --patch P --apply-template --prompt TEXT

    M is a model, a folder or an id on the Hub. F is sentence pairs (ksl-patch build --help). P is a patch: a file, a
    name or digest of the local store, or hf://ORG/REPO[@REV]/FILE.
    """


_others = warnings.showwarning


def _say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning of ours in one line, another's as ever."""
    if issubclass(category, OtherBodyWarning | OtherVocabularyWarning):
        click.echo(f"Warning: {visible(str(message))}", err=True)
    else:
        _others(message, category, *where, **more)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 an error in one line on stderr, 2 wrong usage, 130 interrupted.

    With --json the error is an object on stderr: `error`, a sentence, and `exit_code`.
    """
    warnings.showwarning = _say
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        logging.disable(logging.WARNING)  # what libraries say of themselves would drown our one line
    try:
        code = cli.main(arguments, prog_name="ksl-patch", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, click.ClickException):
            raise
        code, sentence = _in_words(error, arguments)
        if "--json" in arguments:
            click.echo(json.dumps({"error": sentence, "exit_code": code}), err=True)
        elif isinstance(error, click.ClickException):
            error.show()
        else:
            click.echo(sentence if code == _INTERRUPTED else f"Error: {visible(sentence)}", err=True)
    sys.exit(code if isinstance(code, int) else 0)  # a command's own exit code, such as verify's 1


def _in_words(error: BaseException, arguments: list[str]) -> tuple[int, str]:
    """The exit code of what ended a command, and a sentence."""
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, click.Abort | KeyboardInterrupt):
        kept = "What was finished is kept; the same command continues from there."
        return _INTERRUPTED, f"Interrupted. {kept}" if {*arguments[:1]} & {*_RESUMED} else "Interrupted."
    if isinstance(error, KslPatchError):
        return 1, str(error)
    reason = (str(error).strip().splitlines() or [""])[0]
    return 1, f"{type(error).__name__}: {reason} (--debug shows where)"
