"""Making a prompt template, whose rendering a patch keeps (`TemplateMeta`); putting pairs in is encoding.py's."""

from __future__ import annotations

import re
from typing import Any

from ksl_patch.data.languages import language_name
from ksl_patch.errors import RunError
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.names import check_fields

_PROBE = "a <b> & \"c\" - 'd'"  # what a template may escape or rewrite


def make_template(
    kind: str,
    *,
    source_language: str,
    language: str,
    tokenizer: Any,
    system: str | None = None,
    instruction: bool = True,
) -> TemplateMeta:
    r"""The prompt template: "plain", "chat" (the model's own chat template), or a text with `{source}`.

    In a text of one's own, `\n` stands for a line break, and any other `{name}` for a column of the pairs.
    system: a chat's system prompt, which may name columns too. instruction: whether a chat's user asks for a
    translation of the sentence; else the sentence is all that the user says.
    """
    source, target = language_name(source_language), language_name(language)
    if system is not None and "{source}" in system:
        raise RunError("the sentence goes into the user's message: remove {source} from the system prompt.")
    fields = template_fields(kind, system) or None
    if kind == "plain":
        return TemplateMeta(
            text=f"Translate this sentence from {source} to {target}.\n{source}: {{source}}\n{target}:", chat=False
        )
    if kind != "chat":
        text = kind.replace("\\n", "\n")
        if text.count("{source}") != 1:
            raise RunError("a template of your own must contain '{source}' exactly once, where the sentence goes.")
        return TemplateMeta(text=text, chat=False, fields=fields)
    if not getattr(tokenizer, "chat_template", None):
        raise RunError("this base has no chat template; use the plain template or a text of your own.")
    messages = [] if system is None else [{"role": "system", "content": system.replace("\\n", "\n")}]
    asked = f"Translate this sentence from {source} to {target}.\n" if instruction else ""
    messages.append({"role": "user", "content": f"{asked}{{source}}"})
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
    text = (system or "") if kind in ("plain", "chat") else kind
    names = re.findall(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", text)
    fields = [name for name in dict.fromkeys(names) if name != "source"]
    check_fields(fields)
    return fields


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
