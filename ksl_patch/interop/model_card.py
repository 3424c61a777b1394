"""The card of a base with patches in its tables, and their entries in its list for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ksl_patch.base.model_id import public_id
from ksl_patch.patch import Patch
from ksl_patch.patch.wording import fenced


def entry(patch: Patch) -> dict[str, Any]:
    """A patch that is in the tables, for programs."""
    return {
        "name": patch.meta.name,
        "language": patch.meta.language,
        "digest": patch.digest,
        "token_ids": patch.token_ids.tolist(),
        "side": patch.meta.side,
        "licence": patch.meta.licence,
        "template": patch.meta.template and asdict(patch.meta.template),
    }


def card(
    patches: Sequence[Patch], base: str, *, rows: int, untied: bool, lost: int = 0,
    inside: Sequence[dict[str, Any]] = (), other: str | None = None, in_texts: Sequence[str] = (),
) -> str:  # fmt: skip
    """The model card: what was changed, each patch's digest, and the prompt that it answers to.

    inside: entries of patches that the base had already. other: what the base is called, where it is not the patches'.
    in_texts: patches with rows of tokens that texts have, beside others.
    """
    from huggingface_hub import ModelCardData

    meta = patches[0].meta
    named = _line(other or meta.base.model_id or public_id(base) or "a base")
    languages = [patch.meta.language.split("-")[0].lower() for patch in patches if patch.meta.language]
    data = ModelCardData(
        base_model=named, base_model_relation="finetune", library_name="transformers",
        language=list(dict.fromkeys(languages)) or None, tags=["embedding-patch", "ks-lottery"],
    )  # fmt: skip
    head = (
        "The base's head shares the embedding's table, and the patches leave the head alone: here it has a table of "
        "its own (`tie_word_embeddings` is false)."
        if untied
        else "Its head is as the base has it, with the patches' rows where they change it too."
    )
    if lost:
        head += f" {missing(lost)}"
    if other is not None:
        made_for = f" ({_line(meta.base.model_id)})" if meta.base.model_id else ""
        head += f" The patches were made for another model with the same rows{made_for}: this one has other weights."
    if in_texts:
        head += f" {mixed(in_texts)}"
    if inside:
        head += f" The base had {len(inside)} of the patches below already; they are here as they were there."
    sections = [*map(entry_section, inside), *map(_section, patches)]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {named} with {len(patches)} embedding patch{'es' * (len(patches) > 1)}\n\n"
        f"{rows} of the {meta.base.vocab_size:,} rows of the embedding table are other ones than the base's "
        f"(fingerprint `{meta.base.fingerprint[:12]}`); all other weights are the base's. {head} The base's licence "
        "applies, and each patch's own. A patch acts where a prompt has its tokens: give the prompt as it stands "
        "below, with the sentence at `{source}`.\n\n" + "\n\n".join(sections) + "\n"
    )


def mixed(in_texts: Sequence[str]) -> str:
    """In words, that some of several patches act in the others' prompts."""
    names = ", ".join(map(_line, in_texts))
    return f"Rows of {names} are of tokens that texts have: they act in the prompts of the other patches here too."


def missing(lost: int) -> str:
    """In words, what a written model has not of its base's files."""
    return (
        f"{lost:,} values of the base's files are not here, since transformers' class for it has no place for them (a "
        "head that drafts, say)."
    )


def entry_section(entry: dict[str, Any]) -> str:
    """The same of a patch that the base had."""
    template = entry["template"]
    facts = {"language": entry["language"], "licence": entry["licence"], "rows": len(entry["token_ids"])}
    lines = [f"- {name}: {_line(str(value))}" for name, value in facts.items() if value is not None]
    lines.append(f"- digest: `{_line(str(entry['digest']))}`")
    prompt = "" if template is None else f"\n\n{fenced(json.dumps(template['text'], ensure_ascii=False), 'json')}"
    return f"## {_line(str(entry['name']))}\n\n" + "\n".join(lines) + prompt


def _section(patch: Patch) -> str:
    meta = patch.meta
    facts = [
        ("language", meta.language),
        ("digest", f"`{patch.digest}`"),
        ("rows", str(len(patch.token_ids))),
        ("rows chosen by", meta.ticket and meta.ticket.rule),
        ("licence", meta.licence),
    ]
    lines = [f"- {name}: {value if name == 'digest' else _line(str(value))}" for name, value in facts if value]
    head = f"## {meta.name}\n\n" + "\n".join(lines) + "\n\n"
    if meta.template is None:
        parts = ", ".join(_line(origin.name) for origin in meta.origin or ())
        return head + f"It names no prompt{f': it was merged from {parts}, whose prompts it answers' if parts else ''}."
    rest = ["`ksl_patch.json` has all of its template"]
    if meta.template.chat:
        rest.append("it has its special tokens, so tokenise it with `add_special_tokens=False`")
    if meta.template.end_token_id is not None:
        rest.append(f"an answer ends with the token {meta.template.end_token_id}, so stop there (`eos_token_id`)")
    prompt = fenced(json.dumps(meta.template.text, ensure_ascii=False), "json")
    return head + f"Its prompt, as a JSON string ({'; '.join(rest)}):\n\n{prompt}"


def _line(text: str) -> str:
    """A text from a patch as text of one line, and no Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))
