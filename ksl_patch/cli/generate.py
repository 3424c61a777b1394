"""`ksl-patch generate`: one mixed batch, another patch for every prompt."""

from __future__ import annotations

import json

import click

from ksl_patch.terminal import visible

_BASE = "base"


@click.command(context_settings={"show_default": True})
@click.option("--base", required=True, metavar="M", help="Base model: a local folder or a Hub id.")
@click.option("--revision", metavar="REV", help="Revision of the base on the Hub.")
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    help="Patch for the prompt in the same place: a file, a name or digest of the local store, hf://ORG/REPO/FILE, "
    "or the word base. One patch serves them all.",
)
@click.option(
    "--prompt", "prompts", multiple=True, required=True, metavar="T", help="Prompt; give it several times for a batch."
)
@click.option("--apply-template", is_flag=True, help="Put each prompt into the template its patch was trained with.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, help="Stop after this many tokens.")
@click.option("--device", metavar="DEV", help="Where to run.  [default: cuda when there is one, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each prompt.")
def generate(
    base: str, revision: str | None, patches: tuple[str, ...], prompts: tuple[str, ...], apply_template: bool,
    max_new_tokens: int, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Greedy completions of prompts in one batch, each with its own patch or none."""
    if len(patches) not in (0, 1, len(prompts)):
        raise click.UsageError(
            f"{len(patches)} --patch for {len(prompts)} --prompt: give one for each prompt ('base' for none), "
            "one for all, or none."
        )
    if not all(prompts):
        raise click.UsageError("a --prompt is empty.")
    choices = list(patches or [_BASE]) * (1 if len(patches) == len(prompts) else len(prompts))

    from ksl_patch.hf import generate as run
    from ksl_patch.hf import load_base, prompt_ids
    from ksl_patch.store.local import load

    loaded = {choice: load(choice) for choice in dict.fromkeys(choices) if choice != _BASE}
    model, tokenizer = load_base(base, revision=revision, device=device)
    for patch in loaded.values():
        patch.check(model, tokenizer)

    ids, ends = [], []
    for number, (choice, prompt) in enumerate(zip(choices, prompts, strict=True), start=1):
        template = loaded[choice].meta.template if choice in loaded else None
        text, chat, end = prompt, False, None
        if template is not None and apply_template:
            text, chat, end = template.render(prompt), template.chat, template.end_token_id
        elif template is not None and template.matches(prompt):
            chat, end = template.chat, template.end_token_id
        elif template is not None:
            how = "--apply-template puts it there" if not template.fields else "give the whole prompt in it"
            click.echo(
                f"Warning: prompt {number} is not in the template that {choice} was trained with, which its effect may "
                f"depend on; {how}.",
                err=True,
            )
        ids += prompt_ids(tokenizer, [text], chat=chat)
        ends.append(end)
    chosen = [loaded.get(choice) for choice in choices]
    completions = run(model, tokenizer, ids, chosen, max_new_tokens=max_new_tokens, ends=ends)
    for choice, prompt, completion in zip(choices, prompts, completions, strict=True):
        if as_json:
            print(json.dumps({
                "patch": None if choice == _BASE else choice, "prompt": prompt, "text": completion.text,
                "stopped": completion.stopped, "tokens": completion.tokens,
            }, ensure_ascii=False))  # fmt: skip
        else:
            click.echo(visible(f"[{choice}] {prompt}\n{completion.text.strip()}\n"))
