"""Reserved tokens: those that a vocabulary keeps for later, so that no text has them; which they are is decided here.

A row of such a token acts where its name is written into a prompt, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

from ksl_patch.base.table import find_embedding

# <unused5> [unused5] <|reserved_special_token_7|> <reserved_106> <|extra_3|> <|EXTRA_3_TOKEN|> <SPECIAL_12> <|dummy_7|>
# <|placeholder1|> [UNUSED_TOKEN_146] >>UNUSED_119<< <｜place▁holder▁no▁799｜>; always with a number, between brackets.
_WORD = r"[|｜_]?(?:unused|reserved|extra|special|dummy|place.?holder)[\w.▁-]{0,40}?\d{1,9}\w{0,12}[|｜_]?"
_NAME = re.compile("|".join((f">>{_WORD}<<", f"<{_WORD}>", rf"\[{_WORD}\]")), re.IGNORECASE)
_ROLE = re.compile(r"(token_(id|ids|index)|_(start|end|begin)_id|suppress_tokens|(words|decoder)_ids)$")
_AROUND = ("{0}", "a{0}b", " {0} ", "{0}{0}", "\n{0}\n", "1{0}.{0}")


def names_in(texts: Iterable[str]) -> set[str]:
    """What reads like a reserved token's name in texts, in lower case: a tokenizer may not tell cases apart."""
    return {name.lower() for text in texts for name in _NAME.findall(text)}


class ReservedTokens:
    """The reserved tokens of one tokenizer; its iterator gives their ids in ascending order, as it finds them.

    model: its base, whose configuration names tokens with a role. Ids that the tokenizer has no text for, which tables
    that were rounded up have at their end, are none of them: no template could name them.
    """

    def __init__(self, tokenizer: Any, model: Any = None) -> None:
        self._tokenizer, self._model = tokenizer, model
        self._rows = None if model is None else find_embedding(model).vocab_size

    def __iter__(self) -> Iterator[int]:
        return (i for i in self._by_name.values() if self.why_not(i) is None)

    def in_text(self, text: str) -> list[int]:
        """The ids of those that a text names, ascending."""
        found = {self._by_name[name] for name in _NAME.findall(text) if name in self._by_name}
        return [i for i in sorted(found) if self.why_not(i) is None]

    def named_in(self, texts: Iterable[str]) -> set[str]:
        """What in texts is such a token's name in this vocabulary, in lower case."""
        return names_in(texts) & {name.lower() for name in self._by_name}

    def name(self, token_id: int) -> str:
        """What a text writes for a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id) or "")

    def why_not(self, token_id: int) -> str | None:
        """In words why a token is not reserved; None for one that is."""
        name = self.name(token_id)
        if not _NAME.fullmatch(name):
            return "its name does not say so"
        if self._rows is not None and token_id >= self._rows:
            return "the table has no row for it"
        if token_id in self._roles or name.lower() in self._stops:
            return "the base's configuration gives it a role"
        if name.lower() in self._in_chats:
            return "the chat template has it"
        for around in _AROUND:
            text = around.format(name)
            if self._tokenizer(text, add_special_tokens=False).input_ids.count(token_id) != text.count(name):
                return "the tokenizer does not read its name as this one token"
        return None

    @cached_property
    def _by_name(self) -> dict[str, int]:
        found = {name: i for name, i in self._tokenizer.get_vocab().items() if _NAME.fullmatch(name)}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @cached_property
    def _in_chats(self) -> set[str]:
        """Names in the chat template, and in what it makes of a conversation: it may put names together."""
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            return set()
        texts = list(template.values()) if isinstance(template, dict) else [template]
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for messages in ([{"role": "system", "content": "c"}, *said], said, said[:1]):
            with suppress(Exception):  # the template's own words: it may know no system prompt, or name no default
                texts.append(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return names_in(texts)

    @cached_property
    def _roles(self) -> set[int]:
        """The ids that end or begin something, pad, stand for a picture or for what is unknown, or are put around."""
        named = [name for name in self._tokenizer.special_tokens_map.values() if isinstance(name, str)]
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        unknown = getattr(backend and backend.model, "unk_token", None)  # which the tokenizer need not call so
        found = set(self._tokenizer.convert_tokens_to_ids([*named, *([unknown] if unknown else [])])) - {None}
        found.update(self._tokenizer("a").input_ids)
        for config in self._configs:
            found.update(_ids_of(config, of_role=False))
        return found

    @cached_property
    def _stops(self) -> set[str]:
        """Names in what ends an answer, by the generation's own configuration."""
        return names_in(str(config.get("stop_strings")) for config in self._configs)

    @property
    def _configs(self) -> list[dict[str, Any]]:
        found = (getattr(self._model, "config", None), getattr(self._model, "generation_config", None))
        return [config.to_dict() for config in found if config is not None]


def _ids_of(value: Any, *, of_role: bool) -> Iterator[int]:
    """The numbers in a configuration that stand under a key which names tokens, however deep."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _ids_of(each, of_role=of_role or bool(_ROLE.search(str(key))))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _ids_of(each, of_role=of_role)
    elif of_role and type(value) is int:
        yield value
