"""Languages by their BCP 47 tags: their names, and which tags can be of one."""

from __future__ import annotations

import re

from ksl_patch.errors import DataError, RunError

Languages = tuple[str | None, str | None]  # tags of source and target, as far as they are known


def language_name(tag: str) -> str:
    """The English name of a BCP 47 language tag: "sw" -> "Swahili". Raises DataError."""
    import langcodes

    if not langcodes.tag_is_valid(_standard(tag)):
        try:
            hint = f"{tag!r} is {str(langcodes.find(tag))!r}"
        except LookupError:
            hint = "a BCP 47 tag is such as 'sw', 'pt-BR' or 'zh-Hant'"
        raise DataError(f"{tag!r} is not a known language's tag; {hint}.")
    return str(langcodes.get(_standard(tag)).display_name("en"))


def check_languages(source: str, target: str) -> None:
    """Raise DataError for what is no language's tag, RunError for one language twice."""
    names = language_name(source), language_name(target)
    if _same_language(source, target):
        raise RunError(f"source and target are both {names[1]}: name another language.")


def _same_language(one: str, other: str) -> bool:
    """Whether two BCP 47 tags are of one language in one script and region."""
    return _standard(one) == _standard(other)


def _standard(tag: str) -> str:
    """A tag in its shortest form, an extended language by its own: "zh-yue" is "yue"."""
    import langcodes

    try:
        return str(langcodes.standardize_tag(tag))
    except ValueError:
        return tag


def agree(tag: str, other: str, *, exactly: bool = False) -> bool:
    """Whether two tags can be of one language, in one script and region as far as both say them."""
    import langcodes

    if not (is_tag(tag) and is_tag(other)):
        return False
    one, two = (langcodes.get(each.strip().replace("_", "-")).prefer_macrolanguage() for each in (tag, other))
    if exactly:
        return bool(one.to_tag() == two.to_tag())
    scripts = [each.script or (each.maximize().script if each.territory else None) for each in (one, two)]
    bokmal = {"nb": "no"}
    languages = [bokmal.get(each.language, each.language) for each in (one, two)]
    pairs = (languages, scripts, [one.territory, two.territory])
    return all(a == b or (a is None or b is None) for a, b in pairs)


def is_tag(text: str) -> bool:
    """Whether a text is the tag of a language that there is, with "-" or "_"."""
    import langcodes

    text = text.strip().replace("_", "-")
    return bool(re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}", text)) and bool(langcodes.tag_is_valid(text))


def says_language(text: str, language: str | None) -> bool | None:
    """Whether a file's ending, or a column's name, is of a language; None where it is hardly one's tag."""
    if language is None:
        return None
    if agree(language, text):
        return True
    return False if (len(text) == 2 or re.search("[-_]", text)) and is_tag(text) else None
