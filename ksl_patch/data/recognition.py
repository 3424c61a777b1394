"""Whether a line is in a language: py3langid's answer, among languages that it tells apart on single lines."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

from ksl_patch.errors import DataError

# Widely written languages, of which py3langid confuses no two often (docs/figures.md has the figures). With all of its
# 140, sentences fall to smaller sisters of their language, Indonesian ones to Malay; with the target and the source
# alone, most French is Spanish.
_ANSWERS = "ar cs de el en es fa fi fr he hi hu id it ja ko nl pl pt ro ru sv th tr uk vi zh"


@functools.cache
def recogniser(language: str, source_language: str = "en") -> Callable[[str], bool] | None:
    """What says whether a line is in a language, a BCP 47 tag, and not in another or none.

    None for a language that py3langid does not know. Scripts and regions are not told apart. Raises DataError where
    py3langid cannot be loaded.
    """
    import langcodes
    from py3langid.langid import MODEL_FILE, RAW_FLOOR, LanguageIdentifier

    try:
        identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    except OSError as error:
        raise DataError(
            f"py3langid cannot unpack its model into {tempfile.gettempdir()} ({error.strerror or error}): make room "
            "there, or name another folder in TMPDIR."
        ) from error

    def label(tag: str) -> str:
        # What differs in name alone, such as "nb" and "no" or "cmn" and "zh", is at most 1 apart.
        found: str = langcodes.closest_match(langcodes.get(tag).language or "und", identifier.labels, max_distance=1)[0]
        return found

    target, source = label(language), label(source_language)
    if target == "und":
        return None
    identifier.set_languages({*_ANSWERS.split(), target, source} - {"und"})

    def recognises(line: str) -> bool:
        answer, score = identifier.classify(line)
        return bool(answer == target and score > RAW_FLOOR)  # the floor: nothing in the line says anything

    return recognises
