"""The patch that a request for the base gets by the language that it says; who speaks what is by_language.py's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ksl_patch.errors import DataError
from ksl_patch.patch.by_language import Accepted, ByLanguage, Choice, accepted, check_tags
from ksl_patch.vllm.detection import detect
from ksl_patch.vllm.refusals import RefusalError
from ksl_patch.vllm.served import Patches

_HEADERS = (b"content-language", b"accept-language")  # of a request that says both, the first counts
_FIELD, _ANY = "language", "*"


@dataclass(frozen=True)
class Answer:
    """Who answers a request. digest: of what the name stood for when it was chosen."""

    choice: Choice
    said_by: str
    digest: str | None

    def headers(self, now: str | None, *, succeeds: bool) -> list[tuple[bytes, bytes]]:
        """What the response says of it. now: the digest of what the name stands for when the response begins."""
        found = {"x-ksl-language": f"{self.said_by}: {self.choice.why}"}
        if self.choice.name is not None:
            # Replaced meanwhile, it is not known which of the two answers.
            digest = f"@{self.digest[:8]}" if self.digest and self.digest == now else ""
            found["x-ksl-patch"] = self.choice.name + digest
            if succeeds and self.choice.language:
                found["content-language"] = self.choice.language
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in found.items()]


class Languages:
    """Chooses among the patches of a server. What a request names itself, it gets."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches
        self._of: tuple[Any, ...] | None = None
        self._index = ByLanguage({})

    def find(self, tags: Sequence[str], refused: Sequence[str] = ()) -> Choice:
        """The patch of the first of the tags that has one."""
        # Requests differ where name, id or path do: plugin.py's equality, in place of vLLM's by name alone.
        if (served := self._patches.requests()) != self._of:
            languages = {name: self._patches.language(name) for name in self._patches.names()}
            settings = self._patches.settings
            self._index = ByLanguage(languages, base=settings.base_languages, across_scripts=settings.other_scripts)
            self._of = served
        return self._index.choose(tags, refused)

    def choose(self, headers: Iterable[tuple[bytes, bytes]], content: dict[str, Any]) -> Answer | None:
        """Put the patch of a request's language in the place of the base, in its body.

        None where the request names a patch, or says no language and none is detected. Raises RefusalError: a 400 for
        what is no list of languages, and with `strict_language` a 406 where no patch speaks any of them.
        """
        model, settings = content.get("model"), self._patches.settings
        if model not in (None, "") and not (isinstance(model, str) and self._patches.is_base(model)):
            return None
        try:
            said_by, said = _said(headers, content.pop(_FIELD, None))
        except DataError as error:
            raise RefusalError(400, str(error)) from error
        tags, detected = said.tags, None
        if not said_by and settings.detect_language and (detected := detect(content)):
            said_by, tags = f"detected, score {detected[1]:.2f}", (detected[0],)
        if not said_by:
            return None
        choice = self.find(tags, said.refused)
        if choice.name is None:
            if settings.strict_language and choice.language is None and tags and not (detected or said.any):
                raise RefusalError(406, choice.why)
            return Answer(choice, said_by, None)
        content["model"] = choice.name
        return Answer(choice, said_by, self._patches.digest(choice.name))


def _said(headers: Iterable[tuple[bytes, bytes]], field: Any) -> tuple[str, Accepted]:
    """Where a request says its languages, and these; nowhere for a header that takes any. Raises DataError."""
    given: dict[bytes, list[str]] = {}
    for name, value in headers:
        if name in _HEADERS:
            given.setdefault(name, []).append(value.decode("latin-1"))
    said_by, said = "", Accepted()
    for name in (name for name in _HEADERS if name in given):
        found = accepted(",".join(given[name]))
        if found.tags:
            ignored = f" but for {len(found.ignored)} of no language" if found.ignored else ""
            said_by, said = name.decode() + ignored, found
            break
    if field is None:
        return said_by, said
    if field == _ANY:
        return _FIELD, Accepted(any=True)
    tags = [field] if isinstance(field, str) else field
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, str) for tag in tags):
        raise DataError(
            f"language is the tag of a language, such as 'pt-BR', a list of them, or {_ANY!r} for the base."
        )
    conflict = said_by and said.tags != tuple(tags)
    return f"{_FIELD}, which goes before {said_by}" if conflict else _FIELD, Accepted(tuple(check_tags(tags)))
