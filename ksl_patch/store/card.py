"""The model card of a repository with patches: one section for each, between marks, so that a push replaces its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ksl_patch.base.model_id import is_hub_id
from ksl_patch.errors import HubError, PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Evaluation, Figure, read
from ksl_patch.patch.file import SUFFIX
from ksl_patch.patch.wording import against, fenced, known_elsewhere, level_of, of_seeds, where_from, with_interval

CARD = "README.md"
_TAGS = ("embedding-patch", "ks-lottery")
_TOKENS = 60


def make_card(patch: Patch, repo: str, file: str, old: str | None, *, base_model: str | None = None) -> str:
    """The card with a patch's section, put into `old` where there is one. Raises HubError.

    base_model: the base's id on the Hub; by default the one in the metadata, where it looks like one.
    """
    from huggingface_hub import ModelCardData

    meta = patch.meta
    base = base_model or meta.base.model_id
    if base is None or not is_hub_id(base):
        raise HubError(f"the patch's base is {base or 'unnamed'}, not an id on the Hub: name it with --base-model ID.")
    data, text = _parts(old or "", repo)
    data |= {
        "base_model": _plain(_with(data.get("base_model"), base)),
        "base_model_relation": "adapter",
        "library_name": "ksl_patch",
        "language": _with(data.get("language"), meta.language.split("-")[0].lower() if meta.language else None),
        "license": _plain(_with(data.get("license"), meta.licence.lower() if meta.licence else None)),
        "tags": _with(data.get("tags"), *_TAGS),
    }
    begin, end = f"<!-- ksl_patch {file} -->", f"<!-- /ksl_patch {file} -->"
    section = f"{begin}\n{_section(patch, repo, file, base)}\n{end}"
    text = text.strip() or f"# Embedding patches for {base}\n\n{_WHAT}"
    before, found, rest = text.partition(begin)
    if found:
        _, closed, after = rest.partition(end)
        text = before + section + (after if closed else f"\n{rest}")
    else:
        text = f"{text}\n\n{section}"
    try:
        header = ModelCardData(**{key: value for key, value in data.items() if value not in (None, [])}).to_yaml()
    except (ValueError, TypeError, KeyError) as error:
        raise HubError(f"the card of {repo} cannot be written again ({error}): mend its metadata first.") from error
    return f"---\n{header}\n---\n\n{text.strip()}\n"


def _parts(card: str, repo: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text. What YAML 1.1 would change, as the language `no` or 1.10, stays."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    plain = {
        "tag:yaml.org,2002:bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
        "tag:yaml.org,2002:int": ("-?(0|[1-9][0-9]*)", "-0123456789"),
        "tag:yaml.org,2002:float": (r"-?(0|[1-9][0-9]*)\.([0-9]*[1-9]|0)", "-0123456789"),
        "tag:yaml.org,2002:null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
        "tag:yaml.org,2002:merge": ("<<", "<"),
    }
    Loader.yaml_implicit_resolvers = {}
    for tag, (rule, first) in plain.items():
        Loader.add_implicit_resolver(tag, re.compile(f"(?:{rule})$"), list(first))
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n((?:.*?\n)?)---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if not found:
        return {}, card
    try:
        data = yaml.load(found[1], Loader) or {}  # a safe one
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise HubError(f"the card of {repo} cannot be read ({reason}): mend its metadata first.") from error
    if not isinstance(data, dict):
        raise HubError(f"the card of {repo} cannot be read (its metadata is no mapping): mend it first.")
    return {str(key): value for key, value in data.items()}, card[found.end() :]


_WHAT = """An *embedding patch* replaces a handful of rows of a language model's embedding table. It is data, no code,
and one model in memory serves any number of patches, another one for each request (`pip install ksl-patch`)."""


def _section(patch: Patch, repo: str, file: str, base: str) -> str:
    meta, name = patch.meta, file.removesuffix(SUFFIX).rpartition("/")[2]
    facts = {
        "language": meta.language,
        "base": f"`{base}`, fingerprint `{meta.base.fingerprint[:12]}`",
        "rows": f"{len(patch.token_ids)} of {meta.base.vocab_size:,}, {meta.base.hidden_size} values each",
        "side, scope": f"{meta.side}, {meta.scope}",
        "rows chosen by": meta.ticket and meta.ticket.rule,
        "elsewhere": known_elsewhere(meta),
        "training read": meta.training and meta.training.read,
        "licence": meta.licence,
        "digest": f"`{patch.digest}`",
    }
    parts = [f"## {name}", markdown_table(("", ""), [(key, value) for key, value in facts.items() if value])]
    if meta.template is not None:
        parts.append(
            f"It was trained with this prompt, and its effect may depend on it:\n\n{fenced(meta.template.text)}"
        )
    if meta.tokens:
        more = f"\n... and {len(meta.tokens) - _TOKENS} more" if len(meta.tokens) > _TOKENS else ""
        parts.append("Its tokens:\n\n" + fenced(" ".join(repr(token) for token in meta.tokens[:_TOKENS]) + more))
    if figures := _figures(meta.evaluation):
        parts.append(f"### Evaluation\n\n{figures}")
    parts.append(
        f"""### Use

```console
$ ksl-patch serve {base} --patch {name}=hf://{repo}/{file}    # vLLM's OpenAI server; requests say "model": "{name}"
$ ksl-patch generate --base {base} --patch hf://{repo}/{file} --apply-template --prompt "..."
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from ksl_patch import attach

model = AutoModelForCausalLM.from_pretrained("{base}")
handle = attach(model, tokenizer=AutoTokenizer.from_pretrained("{base}"))
handle.load("hf://{repo}/{file}", "{name}")
with handle.using("{name}"):  # or a list, an entry for each row of the batch
    model.generate(...)
```"""
    )
    return "\n\n".join(parts)


def _figures(value: dict[str, Any] | None) -> str:
    """The evaluation as a table: its systems, or where it has none, its numbers as they are named in the file."""
    try:
        evaluation = read(Evaluation, value)
    except PatchError:  # another tool's
        evaluation = None
    if evaluation is None or not evaluation.systems:
        rows = [(key, f"{number:.4g}") for key, number in (value or {}).items() if isinstance(number, int | float)]
        where = "as the file has it" if evaluation is None else f"on {evaluation.what}"
        return markdown_table((where, ""), rows) if rows else ""
    head = ("", *evaluation.metrics.values())
    level = level_of([evaluation.confidence or 0])
    how = (
        f"On {evaluation.what}, greedy, at most {evaluation.max_new_tokens} new tokens; in brackets "
        f"the {level} interval of the difference from the base (paired bootstrap)."
    )
    parts = [how, markdown_table(head, _lines(evaluation, with_interval))]
    if gain := where_from(evaluation):
        parts.append(gain)
    if leads := _lines(evaluation, against):
        parts += [f"The patch minus each of them, and the {level} interval of that:", markdown_table(head, leads)]
    if ranges := _lines(evaluation, of_seeds):
        parts += ["The range over training seeds:", markdown_table(head, ranges)]
    notes = [*evaluation.notes, *(f"{name}: {value}" for name, value in evaluation.signatures.items())]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _lines(evaluation: Evaluation, show: Callable[[str, Figure | None], str]) -> list[tuple[str, ...]]:
    """A line for each system of which there is something to show."""
    lines = [(s.label, *(show(name, s.figures.get(name)) for name in evaluation.metrics)) for s in evaluation.ordered]
    return [line for line in lines if any(line[1:])]


def markdown_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    cells = [[" ".join(str(cell).replace("|", "\\|").split("\n")) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _with(known: Any, *more: str | None) -> list[str]:
    """A card's value, one or a list, and others that it may lack."""
    values = [known] if isinstance(known, str) else [str(value) for value in known or ()]
    return values + [value for value in dict.fromkeys(more) if value is not None and value not in values]


def _plain(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values
