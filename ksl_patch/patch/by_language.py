"""Which of several patches speaks a language: RFC 4647's lookup, with langcodes' distances between tags."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import langcodes

from ksl_patch.errors import DataError

# CLDR's distance of regions of one language is 5 at most ("pt-PT" and "pt-BR"), that of languages which their speakers
# understand is 8 or more (Bosnian and Croatian), that of scripts 44 or more.
FARTHEST = 5
MOST_TAGS, _MOST_CHARACTERS = 32, 1000
_TAG = re.compile(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,8}")
_WEIGHT = re.compile(r"q=(0(\.[0-9]{0,3})?|1(\.0{0,3})?)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The patch that a list of languages gets. name: None for the base. language: the patch's own tag.

    asked: the tag of the list that it was found for. why: in a sentence, also where there is none.
    """

    name: str | None
    language: str | None
    asked: str | None
    why: str


class ByLanguage:
    """Patches by their language. languages: BCP 47 tags by name, of equal ones the first counts; None has none.

    across_scripts: whether a patch in another script of the language will do, such as "uz" for "uz-Cyrl".
    """

    def __init__(self, languages: Mapping[str, str | None], *, across_scripts: bool = False) -> None:
        self._across = across_scripts
        self._tags: dict[str, dict[str, str]] = {}  # of each language, the first name of each of its tags
        for name, tag in languages.items():
            if tag is not None:
                self._tags.setdefault(_language(tag), {}).setdefault(tag, name)
        self._choose = functools.lru_cache(maxsize=1024)(self._look_up)

    def choose(self, tags: Sequence[str]) -> Choice:
        """The patch of the first of the tags that has one: the nearest, of equally near ones the first.

        tags: BCP 47, the most wanted first. Raises DataError for what is none.
        """
        return self._choose(tuple(tags))

    def _look_up(self, tags: tuple[str, ...]) -> Choice:
        for asked in tags:
            if found := self._nearest(asked):
                distance, tag, name = found
                near = "the same" if distance == 0 else f"{distance} from it"
                return Choice(name, tag, asked, f"{name} is {tag}, by CLDR's distance {near} for {asked}.")
        return Choice(None, None, None, f"no patch speaks {', '.join(tags)}." if tags else "no language was asked for.")

    def _nearest(self, asked: str) -> tuple[int, str, str] | None:
        known = self._tags.get(_language(asked), {})
        found: list[tuple[int, str, str]] = []
        for tag, name in known.items():
            distance = langcodes.tag_distance(asked, tag)
            if distance <= FARTHEST or (self._across and _but_for_script(asked, tag) <= FARTHEST):
                found.append((distance, tag, name))
        return min(found, key=lambda each: each[0], default=None)


def accepted(header: str) -> list[str]:
    """The tags of an `Accept-Language` or `Content-Language` header, the most wanted first (RFC 9110).

    Tags of weight 0 are left out, and so is "*": any language is the base's. Raises DataError for what is no such
    header.
    """
    if len(header) > _MOST_CHARACTERS:
        raise DataError(f"a list of languages has at most {_MOST_CHARACTERS} characters, not {len(header)}.")
    parts = [part.strip() for part in header.split(",") if part.strip()]
    if len(parts) > MOST_TAGS:
        raise DataError(f"a list of languages has at most {MOST_TAGS} tags, not {len(parts)}.")
    weighed: list[tuple[float, str]] = []
    for part in parts:
        tag, *weights = (each.strip() for each in part.split(";"))
        if len(weights) > 1 or not all(map(_WEIGHT.fullmatch, weights)):
            raise DataError(f"{part[:100]!r} is not a language with a weight, such as 'pt-BR;q=0.5'.")
        weight = float(weights[0][2:]) if weights else 1.0
        if tag != "*":
            check_tag(tag)
            weighed.append((weight, tag))
    refused = {tag.lower() for weight, tag in weighed if weight == 0}
    weighed.sort(key=lambda each: -each[0])  # of equal weights the first comes first
    return [tag for _, tag in weighed if tag.lower() not in refused]


def check_tags(tags: Iterable[str]) -> list[str]:
    """The same tags. Raises DataError for too many, or what is no BCP 47 tag."""
    found = [check_tag(tag) for tag in tags]
    if len(found) > MOST_TAGS:
        raise DataError(f"a list of languages has at most {MOST_TAGS} tags, not {len(found)}.")
    return found


def check_tag(tag: str) -> str:
    """A well-formed BCP 47 tag of a language that there is. Raises DataError."""
    if not _TAG.fullmatch(tag) or not _is_known(tag):
        raise DataError(f"{tag[:100]!r} is not the tag of a language; examples are 'sw', 'pt-BR' and 'zh-Hant'.")
    return tag


@functools.lru_cache(maxsize=4096)
def _is_known(tag: str) -> bool:
    return bool(langcodes.tag_is_valid(tag))


@functools.lru_cache(maxsize=4096)
def _language(tag: str) -> str:
    """The language of a tag, by which patches are filed: what is nearer than `FARTHEST` shares it."""
    language = langcodes.get(tag).prefer_macrolanguage().language or "und"
    return {"nb": "no", "tl": "fil"}.get(language, language)


def _but_for_script(one: str, other: str) -> int:
    """The distance of a tag from another if it were written in the other's script."""
    asked, script = langcodes.get(one), langcodes.get(other).maximize().script
    written = langcodes.Language.make(language=asked.language, script=script, territory=asked.territory)
    return int(langcodes.tag_distance(written, other))
