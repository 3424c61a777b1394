"""`ksl-patch generate`: one mixed batch, another patch for every prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from ksl_patch.cli.options import REFERENCE, base_option, device_option, json_option, revision_option, starting
from ksl_patch.terminal import PlainConsole, visible

if TYPE_CHECKING:
    from ksl_patch.hf import Completion
    from ksl_patch.patch import Patch

_BASE = "base"


@click.command(context_settings={"show_default": True})
@base_option("Base model: a local folder or a Hub id.  [default: the patch's own]")
@revision_option()
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    type=REFERENCE,
    help="Patch for the prompt in the same place: a file, a name or digest of the local store, hf://ORG/REPO/FILE, "
    "or the word base. One patch serves them all.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="T", help="Prompt; give it several times for a batch.")
@click.option(
    "--prompts",
    "file",
    type=click.File("r", encoding="utf-8-sig"),
    metavar="F",
    help="A file of prompts, one a line; - for standard input. Prints an answer a line.",
)
@click.option(
    "--apply-template",
    is_flag=True,
    help="Put each prompt into the template its patch was trained with; one for the base, into that of all patches.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, help="Stop after this many tokens.")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Prompts in a batch.")
@device_option()
@json_option("Print a JSON line for each prompt.")
def generate(
    base: str | None, revision: str | None, patches: tuple[str, ...], prompts: tuple[str, ...], file: TextIO | None,
    apply_template: bool, max_new_tokens: int, batch_size: int, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Greedy completions of prompts in mixed batches, each prompt with its own patch or none."""
    if (file is None) == (not prompts):
        raise click.UsageError("give prompts with --prompt, or a file of them with --prompts.")
    lines = list(prompts) if file is None else _lines(file)
    texts = lines if file is None else [line for line in lines if line.strip()]
    if len(patches) not in (0, 1, len(texts)):
        raise click.UsageError(
            f"{len(patches)} --patch for {len(texts)} --prompt: give one for each prompt ('base' for none), one for "
            "all, or none."
        )
    if not all(text.strip() for text in texts) or not texts:
        raise click.UsageError("a --prompt is empty." if file is None else f"{file.name} has no prompts.")
    choices = list(patches or [_BASE]) * (1 if len(patches) == len(texts) else len(texts))

    starting(as_json)
    from ksl_patch.hf import generate as run
    from ksl_patch.hf import load_base, prompt_ids
    from ksl_patch.store.references import load

    loaded = {choice: load(choice) for choice in dict.fromkeys(choices) if choice != _BASE}
    base = base or _base_of(list(loaded.values()))
    if not as_json:
        click.echo(f"Loading {visible(base)} ...", err=True)
    model, tokenizer = load_base(base, revision=revision, device=device)
    for patch in loaded.values():
        patch.check(model, tokenizer)

    templates = [patch.meta.template and patch.meta.template.of_base() for patch in loaded.values()]
    shared = templates[0] if templates and all(each == templates[0] for each in templates) else None
    ids, ends, outside = [], [], []
    for number, (choice, prompt) in enumerate(zip(choices, texts, strict=True), start=1):
        template = loaded[choice].meta.template if choice in loaded else shared if apply_template else None
        text, chat, end = prompt, False, None
        if template is not None and apply_template:
            text, chat, end = template.render(prompt), template.chat, template.end_token_id
        elif template is not None and template.matches(prompt):
            chat, end = template.chat, template.end_token_id
        elif template is not None:
            how = "--apply-template puts it there" if not template.fields else "give the whole prompt in it"
            outside.append(
                f"prompt {number} is not in the template that {choice} was trained with, which its effect may depend "
                f"on; {how}"
            )
        elif apply_template and choice in loaded:
            outside.append(f"{choice} names no template, so prompt {number} is as it was given")
        elif apply_template and any(templates):
            outside.append(
                f"the patches have different templates, so prompt {number}, for the base, is as it was given"
            )
        ids += prompt_ids(tokenizer, [text], chat=chat)
        own = loaded.get(choice)
        if own and own.meta.side == "input" and set(ids[-1]).isdisjoint(own.token_ids.tolist()):
            outside.append(f"prompt {number} has no token of {choice}, which changes nothing until an answer has one")
        ends.append(end)
    if outside:
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        click.echo(f"Warning: {visible(outside[0])}{more}.", err=True)
    chosen = [loaded.get(choice) for choice in choices]
    cut, printed = 0, iter(lines)
    with _progress(len(texts), shown=len(texts) > batch_size) as advance:
        for begin in range(0, len(texts), batch_size):
            here = slice(begin, begin + batch_size)
            answers = run(model, tokenizer, ids[here], chosen[here], max_new_tokens=max_new_tokens, ends=ends[here])
            for choice, prompt, answer in zip(choices[here], texts[here], answers, strict=True):
                cut += not answer.stopped
                if file is not None and not as_json:
                    for _ in takewhile(lambda line: not line.strip(), printed):
                        click.echo("")  # so that answers stand at the lines of their prompts
                _show(choice, prompt, answer, as_json=as_json, alone=file is not None, limit=max_new_tokens)
            advance(len(answers))
    if cut and file is not None and not as_json:
        count = "1 answer was" if cut == 1 else f"{cut} answers were"
        click.echo(f"Note: {count} cut at --max-new-tokens {max_new_tokens}.", err=True)


def _lines(file: TextIO) -> list[str]:
    """A prompt a line. Raises UsageError for what is no text."""
    try:
        return file.read().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file.name} cannot be read as UTF-8 text: save it as UTF-8.") from error


def _base_of(patches: list[Patch]) -> str:
    """The base that all patches name, where it is on the Hub or here."""
    names = {patch.meta.base.model_id for patch in patches}
    name = names.pop() if len(names) == 1 else None
    if name is None or not ("/" in name or Path(name).is_dir()):
        raise click.UsageError(f"name the base with --base: the patches say {name or 'none, or several'}.")
    return name


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.progress import Progress

    console = PlainConsole(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda count: bar.advance(task, count)


def _show(choice: str, prompt: str, answer: Completion, *, as_json: bool, alone: bool, limit: int) -> None:
    if as_json:
        print(json.dumps({
            "patch": None if choice == _BASE else choice, "prompt": prompt, "text": answer.text,
            "stopped": answer.stopped, "tokens": answer.tokens,
        }, ensure_ascii=False))  # fmt: skip
    else:
        end = "" if answer.stopped else f" [cut at {limit} tokens]"
        text = " ".join(answer.text.split()) if alone else f"[{choice}] {prompt}\n{answer.text.strip()}{end}\n"
        click.echo(visible(text) if sys.stdout.isatty() else text)
