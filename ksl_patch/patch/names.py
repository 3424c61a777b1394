"""What a patch, its template's fields and its language may be called."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ksl_patch.errors import PatchError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MAX_FIELDS = 16
# RFC 5646: language, script, region, variants, extensions and private use; well-formed, not registered.
_LANGUAGE = re.compile(
    r"[A-Za-z]{2,8}(-[A-Za-z]{3}){0,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|[0-9]{3}))?(-([A-Za-z0-9]{5,8}|[0-9][A-Za-z0-9]{3}))*"
    r"(-[A-WY-Za-wy-z0-9](-[A-Za-z0-9]{2,8})+)*(-x(-[A-Za-z0-9]{1,8})+)?"
)


def is_name(name: str) -> bool:
    """Whether a text can be a patch's name."""
    return bool(_NAME.fullmatch(name))


def check_name(name: str) -> str:
    """A patch's name, if it is one. Raises PatchError."""
    if not is_name(name):
        raise PatchError(
            f"{name[:100]!r} is not a patch name: use up to 96 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit."
        )
    return name


def check_fields(names: Sequence[str]) -> None:
    """Names of a template's fields beside the source. Raises PatchError."""
    for name in names:
        if not _FIELD.fullmatch(name) or name == "source":
            raise PatchError(
                f"{name[:70]!r} cannot be a template's field: use up to 64 letters, digits and '_', and not 'source'."
            )
    if len(names) > _MAX_FIELDS:
        raise PatchError(f"a template has at most {_MAX_FIELDS} fields beside the sentence, not {len(names)}.")


def check_language(language: str) -> None:
    """A well-formed BCP 47 language tag, such as "sw" or "zh-Hant". Raises PatchError."""
    if not _LANGUAGE.fullmatch(language):
        raise PatchError(f"{language[:100]!r} is not a BCP 47 language tag; examples are 'sw', 'pt-BR' and 'zh-Hant'.")
