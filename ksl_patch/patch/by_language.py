"""Which of several patches speaks a language: RFC 4647's lookup, with langcodes' distances between tags."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import langcodes

from ksl_patch.errors import DataError

# CLDR's distance of regions of one language is 5 at most ("pt-PT" and "pt-BR"), that of languages which their speakers
# understand is 8 or more (Bosnian and Croatian). Of most scripts it is 44 or more, but 5 where readers know both.
FARTHEST = 5
MOST_TAGS, _MOST_CHARACTERS = 32, 1000
_MOST_KEPT = 20_000  # of langcodes' own caches, which it never empties
# RFC 5646: language, script, region, variants; and the rest, which says nothing of who understands whom.
_TAG = re.compile(
    r"(?P<core>[a-z]{2,3}(-[a-z]{3}){0,3}(-[a-z]{4})?(-([a-z]{2}|[0-9]{3}))?)"
    r"(?P<variants>(-([a-z0-9]{5,8}|[0-9][a-z0-9]{3})){0,4})(?P<rest>(-[a-z0-9](-[a-z0-9]{1,8})+){0,4})",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r"q=(0(\.[0-9]{0,3})?|1(\.0{0,3})?)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The patch that a list of languages gets. name: None for the base. language: the patch's own tag, or the base's.

    asked: the tag of the list that it was found for. why: in a sentence, also where there is none.
    """

    name: str | None
    language: str | None
    asked: str | None
    why: str


@dataclass(frozen=True)
class Accepted:
    """What a header says. tags: the most wanted first. refused: those of weight 0. any: whether others will do, too.

    ignored: members that are no language with a weight.
    """

    tags: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    any: bool = False
    ignored: tuple[str, ...] = ()


class ByLanguage:
    """Patches by their language. languages: BCP 47 tags by name, of equal ones the first counts; None has none.

    base: tags of languages that the base speaks itself. across_scripts: whether a patch in another script of the
    language will do, such as "uz" for "uz-Cyrl". A tag of no known language is nobody's.
    """

    def __init__(
        self, languages: Mapping[str, str | None], *, base: Sequence[str] = (), across_scripts: bool = False
    ) -> None:
        self._across = across_scripts
        self._tags: dict[str, dict[str, str | None]] = {}  # of each language, the first name of each of its tags
        for name, tag in (*((None, tag) for tag in base), *languages.items()):
            if tag is not None and is_known(tag):
                self._tags.setdefault(_language(tag), {}).setdefault(tag, name)
        self._choose = functools.lru_cache(maxsize=1024)(self._look_up)

    def choose(self, tags: Sequence[str], refused: Collection[str] = ()) -> Choice:
        """The patch of the first of the tags that has one: the nearest, of equally near ones the first.

        tags: BCP 47, known ones, the most wanted first. refused: a patch of just such a tag will not do.
        """
        return self._choose(tuple(tags), frozenset(tag.lower() for tag in refused))

    def _look_up(self, tags: tuple[str, ...], refused: frozenset[str]) -> Choice:
        for asked in tags:
            if found := self._nearest(asked, refused):
                distance, tag, name = found
                near = "the same" if distance == 0 else f"{distance} from it"
                who = "the base" if name is None else name
                speaks = "speaks" if name is None else "is"
                return Choice(name, tag, asked, f"{who} {speaks} {tag}, by CLDR's distance {near} for {asked}.")
        return Choice(None, None, None, f"no patch speaks {', '.join(tags)}." if tags else "no language was asked for.")

    def _nearest(self, asked: str, refused: frozenset[str]) -> tuple[int, str, str | None] | None:
        found: list[tuple[tuple[int, int], str, str | None]] = []
        for tag, name in self._tags.get(_language(asked), {}).items():
            distance = _distance(asked, tag)
            if _script(asked) != _script(tag):
                if not self._across or _but_for_script(asked, tag) > FARTHEST:
                    continue
            elif distance > FARTHEST:
                continue
            if tag.lower() not in refused:
                found.append(((distance, _rank(asked, tag)), tag, name))
        best = min(found, key=lambda each: each[0], default=None)
        return best and (best[0][0], *best[1:])


def accepted(header: str) -> Accepted:
    """An `Accept-Language` or `Content-Language` header (RFC 9110). Raises DataError for one that is too long.

    Browsers and proxies write such headers, so a member that is no language with a weight is left out and said.
    """
    if len(header) > _MOST_CHARACTERS:
        raise DataError(f"a list of languages has at most {_MOST_CHARACTERS} characters, not {len(header)}.")
    parts = [part.strip() for part in header.split(",") if part.strip()]
    if len(parts) > MOST_TAGS:
        raise DataError(f"a list of languages has at most {MOST_TAGS} tags, not {len(parts)}.")
    weighed: list[tuple[float, str]] = []
    ignored = []
    for part in parts:
        tag, *weights = (each.strip() for each in part.split(";"))
        if len(weights) > 1 or not all(map(_WEIGHT.fullmatch, weights)) or not (tag == "*" or is_known(tag)):
            ignored.append(part)
            continue
        weighed.append((float(weights[0][2:]) if weights else 1.0, tag))
    refused = {tag.lower(): tag for weight, tag in weighed if weight == 0}
    weighed.sort(key=lambda each: -each[0])  # of equal weights the first comes first
    wanted = [tag for _, tag in weighed if tag.lower() not in refused]
    tags = tuple(tag for tag in wanted if tag != "*")
    return Accepted(tags, tuple(tag for tag in refused.values() if tag != "*"), "*" in wanted, tuple(ignored))


def check_tags(tags: Sequence[str]) -> list[str]:
    """The same tags. Raises DataError for too many, or what is no BCP 47 tag."""
    if len(tags) > MOST_TAGS:
        raise DataError(f"a list of languages has at most {MOST_TAGS} tags, not {len(tags)}.")
    return [check_tag(tag) for tag in tags]


def check_tag(tag: str) -> str:
    """A well-formed BCP 47 tag of a language that there is. Raises DataError."""
    if not is_known(tag):
        raise DataError(f"{tag[:100]!r} is not the tag of a language; examples are 'sw', 'pt-BR' and 'zh-Hant'.")
    return tag


@functools.lru_cache(maxsize=4096)
def is_known(tag: str) -> bool:
    """Whether a text is a well-formed BCP 47 tag of a language that there is."""
    found = _TAG.fullmatch(tag)
    return found is not None and bool(langcodes.tag_is_valid(_kept(found["core"])))


def _kept(core: str) -> str:
    """The same, once langcodes has room for it: tags come from requests, and it keeps all that it ever saw."""
    for name in ("_PARSE_CACHE", "_INSTANCES"):
        cache = getattr(langcodes.Language, name, None)
        if isinstance(cache, dict) and len(cache) > _MOST_KEPT:
            cache.clear()
    return core.lower()


def _core(tag: str) -> str:
    """Language, script and region of a known tag."""
    found = _TAG.fullmatch(tag)
    assert found is not None
    return _kept(found["core"])


@functools.lru_cache(maxsize=4096)
def _language(tag: str) -> str:
    """The language of a tag, by which patches are filed: what is nearer than `FARTHEST` shares it."""
    language = langcodes.get(_core(tag)).prefer_macrolanguage().language or "und"
    return {"nb": "no", "tl": "fil"}.get(language, language)


@functools.lru_cache(maxsize=4096)
def _script(tag: str) -> str | None:
    script = langcodes.get(_core(tag)).maximize().script
    return None if script is None else str(script)


def _distance(one: str, other: str) -> int:
    return int(langcodes.tag_distance(_core(one), _core(other)))


def _but_for_script(one: str, other: str) -> int:
    """The distance of a tag from another if it were written in the other's script."""
    asked = langcodes.get(_core(one))
    written = langcodes.Language.make(language=asked.language, script=_script(other), territory=asked.territory)
    return int(langcodes.tag_distance(written, _core(other)))


def _rank(asked: str, tag: str) -> int:
    """Of equally near tags: the same one, then what RFC 4647's lookup cuts it to, then one without more to it."""
    one, other = asked.lower(), tag.lower()
    if one == other:
        return 0
    if one.startswith(f"{other}-"):
        return 1 + one.count("-") - other.count("-")
    return 100 if _core(tag) == other else 200


def spoken(tags: Iterable[str | None]) -> str:
    """Languages in a sentence's list."""
    return ", ".join(sorted({tag for tag in tags if tag})) or "none"
