"""Making a prompt template, whose rendering a patch keeps (`TemplateMeta`); putting pairs in is encoding.py's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ksl_patch.data.languages import language_name
from ksl_patch.errors import RunError
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.names import check_fields

SOFT = "{reserved}{source}{reserved:1}"
_ALPACA = (  # Stanford Alpaca's, with an input
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{asked}\n### Input:\n{{source}}\n\n"
    "### Response:\n"
)
_PLACE = re.compile(r"\{reserved(?::([0-9]{1,4}))?\}")
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PROBE = "a <b> & \"c\" - 'd'"  # what a template may escape or rewrite


def make_template(
    kind: str,
    *,
    source_language: str,
    language: str,
    tokenizer: Any,
    system: str | None = None,
    instruction: bool = True,
    reserved: Sequence[str] = (),
    named: Sequence[str] = (),
) -> TemplateMeta:
    r"""The prompt template: "plain", "alpaca", "chat" (the model's own), "soft", or a text with `{source}`.

    In a text of one's own, `\n` stands for a line break, and any other `{name}` for a column of the pairs.
    system: a chat's system prompt, which may name columns too. instruction: whether a chat's user asks for a
    translation of the sentence; else the sentence is all that the user says.
    reserved: names of tokens that stand at `{reserved}`, or, where a template has none, before the prompt, in a chat
    before what its user says. `{reserved:N}` takes N of them for its place alone; "soft" has no words beside them.
    named: those that the texts name themselves. With either, the template has a prompt without them too (`unpatched`):
    of the same words or, where there are none, of the plain ones behind its columns.
    """
    source, target = language_name(source_language), language_name(language)
    if system is not None and "{source}" in system:
        raise RunError("the sentence goes into the user's message: remove {source} from the system prompt.")
    fields, chat = template_fields(kind, system) or None, kind == "chat"
    asked = f"Translate this sentence from {source} to {target}.\n"
    plain = f"{asked}{source}: {{source}}\n{target}:"
    if chat:
        texts = [*([] if system is None else [system]), f"{asked if instruction else ''}{{source}}"]
    else:
        texts = [{"plain": plain, "soft": SOFT, "alpaca": _ALPACA.format(asked=asked)}.get(kind, kind)]
    texts = [text.replace("\\n", "\n") for text in texts]
    if texts[-1].count("{source}") != 1:
        raise RunError("a template of your own must contain '{source}' exactly once, where the sentence goes.")

    def made(texts: list[str]) -> TemplateMeta:
        return _in_chat(texts, tokenizer, fields) if chat else TemplateMeta(text=texts[0], chat=False, fields=fields)

    template = made(_placed(texts, reserved))
    if not reserved and not named:
        return template
    bare = [_without(text, named) for text in texts]
    if chat:
        bare = [*(text for text in bare[:-1] if text.strip()), bare[-1]]
    elif not _has_words(bare[0], tokenizer):
        bare = ["".join(f"{{{name}}}\n" for name in fields or ()) + plain]
    return replace(template, unpatched=made(bare).text)


def _in_chat(texts: list[str], tokenizer: Any, fields: list[str] | None) -> TemplateMeta:
    """The model's own chat template of a user's text, and of a system prompt before it."""
    if not getattr(tokenizer, "chat_template", None):
        raise RunError("this base has no chat template; use the plain template or a text of your own.")
    *before_it, user = texts
    messages = [*({"role": "system", "content": text} for text in before_it), {"role": "user", "content": user}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, end = _turn_around(tokenizer, messages, text)
        probe = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}], tokenize=False)
    except Exception as error:  # the template's own words, in an exception of jinja's or of another kind
        raise RunError(f"this base's chat template refuses the messages ({error}).") from error
    kept = all(message["content"].strip() in text for message in messages) and _PROBE in probe
    if not kept or text.count("{source}") != 1:
        raise RunError(
            "this base's chat template does not keep the messages as they are (it may know no system prompt); "
            "use a text of your own."
        )
    if before.strip():  # an empty block of thoughts, say, which the answer comes after
        text, before = text + before, ""
    return TemplateMeta(
        text=text,
        chat=True,
        fields=fields,
        end_token_id=None if end == tokenizer.eos_token_id else end,
        before_answer=before or None,
    )


def template_fields(kind: str, system: str | None) -> list[str]:
    """The columns beside the source that a template of this kind names. Raises PatchError for what cannot be one."""
    if system is not None and kind != "chat":
        raise RunError("a system prompt is for the chat template: add --template chat, or put it into the template.")
    text = (system or "") if kind in ("plain", "alpaca", "chat") else kind
    if wrong := [each for each in re.findall(r"(?i)\{ *reserved[^}]*\}", text) if not _PLACE.fullmatch(each)]:
        raise RunError(
            f"the template's {wrong[0]} is no place of reserved rows: {{reserved}} is that of all of them, and "
            "{reserved:N} of N."
        )
    names = _FIELD.findall(text)
    fields = [name for name in dict.fromkeys(names) if name not in ("source", "reserved")]
    check_fields(fields)
    return fields


def _without(text: str, names: Sequence[str]) -> str:
    """A text without the places of reserved tokens and those of these names, nor the spaces that set them off."""
    parts = "|".join([r"\{reserved(?::[0-9]{1,4})?\}", *(re.escape(name) for name in names if name)])

    def gone(found: re.Match[str]) -> str:
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        between = before and after and not (before + after).isspace() and "\n" not in (before, after)
        return " " if between and found[0] != found[0].strip(" ") else ""

    return re.sub(f" *(?:(?:{parts}) *)+", gone, text)


def _has_words(text: str, tokenizer: Any) -> bool:
    """Whether a text, beside what is filled in and the tokenizer's own marks, tells a model what to do."""
    marks = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    return any(map(str.isalpha, re.sub("|".join([_FIELD.pattern, *marks]), "", text)))


def _placed(texts: list[str], names: Sequence[str]) -> list[str]:
    """Texts with the reserved tokens at their places; without a place they are before the last text.

    Raises RunError for places that do not fit the number of tokens, or without any.
    """
    places = [place for text in texts for place in _PLACE.findall(text)]
    if not names:
        if places:
            raise RunError(
                "{reserved} in a template, and --template soft, are places of reserved rows: "
                "add --selection reserved --top-k K, or, for tokens that --rows names, write their names there."
            )
        return texts
    if not places:
        return [*texts[:-1], "".join(names) + texts[-1]]
    own = sum(int(number) for number in places if number)
    shared = len(names) - own
    if shared < 0 or (shared == 0) == ("" in places) or "0" in places:
        if texts == [SOFT]:
            raise RunError("--template soft has reserved rows before the sentence and one after it: --top-k 2 or more.")
        raise RunError(
            f"the template places {own}{' and some more' if '' in places else ''} of the {len(names)} reserved rows: "
            "{reserved:N} takes N for itself, and {reserved} stands for all others, at least one; write that for them."
        )
    rest = iter(names[shared:])

    def put(place: re.Match[str]) -> str:
        return "".join(next(rest) for _ in range(int(place[1]))) if place[1] else "".join(names[:shared])

    return [_PLACE.sub(put, text) for text in texts]


def _turn_around(tokenizer: Any, messages: list[dict[str, str]], prompt: str) -> tuple[str, int | None]:
    """What the chat template puts between a prompt and an assistant's answer, and the token that it puts after it.

    messages: what the prompt is the rendering of. "" and None where the template does not tell.
    """
    answer = [{"role": "assistant", "content": _PROBE}]
    before, found, after = tokenizer.apply_chat_template([*messages, *answer], tokenize=False).rpartition(_PROBE)
    if not found:
        return "", None
    head = tokenizer.apply_chat_template(messages, tokenize=False)
    begin = prompt[len(head) :] if prompt.startswith(head) else ""
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
    special |= {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.bos_token_id
    }
    special -= set(tokenizer(begin, add_special_tokens=False).input_ids)  # what begins a turn ends none
    end = next((i for i in tokenizer(after, add_special_tokens=False).input_ids if i in special), None)
    return before.removeprefix(prompt) if before.startswith(prompt) else "", end
