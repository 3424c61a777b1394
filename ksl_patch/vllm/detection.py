"""The language that a request's text is in, as far as py3langid is sure of it.

benchmarks/detection.py has why that one: on sixty languages of the Declaration it is right as often as lingua, at a
tenth of the time, and more often than fastText's small model. A language that it does not know may be taken for a
sister of it, and with a high score.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ksl_patch.errors import RunError

SURE = 0.7  # the score from which 98 % of its answers are right, at 20 characters as at 200
_READ = 300  # characters of a text
_SCRIPTLESS = ("zh",)  # languages of several scripts, of which the identifier does not say which


def detect(content: dict[str, Any]) -> tuple[str, float] | None:
    """The language of what a request asks, a BCP 47 tag, and the score, from `SURE` to 1; None where it is not sure.

    content: the body of a completion, a chat, a response or a message. Several prompts have no one language.
    """
    text = next((text for text in map(" ".join, map(_texts, _asked(content))) if text.strip()), "")
    if not text:
        return None
    tag, score = identifier()(text.strip()[:_READ])
    return (tag, score) if score >= SURE and tag not in _SCRIPTLESS else None


@functools.cache
def identifier() -> Callable[[str], tuple[str, float]]:
    """What says the language of a text, and how sure it is, from 0 to 1. Raises RunError where there is none."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        own = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except ImportError as error:
        raise RunError("--detect-language needs py3langid: pip install 'ksl-patch[detect]'.") from error
    except OSError as error:
        raise RunError(
            f"py3langid cannot unpack its model into {tempfile.gettempdir()} ({error.strerror or error}): make room "
            "there, or name another folder in TMPDIR."
        ) from error

    def identify(text: str) -> tuple[str, float]:
        label, score = own.classify(text)
        return str(label), float(score)

    return identify


def _asked(content: dict[str, Any]) -> Iterator[Any]:
    """Where a body may have its text: the prompt, the input, the last message of a user's."""
    prompts = content.get("prompt")
    if isinstance(prompts, str):
        yield prompts
    for key in ("messages", "input"):
        given = content.get(key)
        if isinstance(given, str):
            yield given
        elif isinstance(given, list):
            said = [each for each in given if isinstance(each, dict) and each.get("role") == "user"]
            yield said[-1].get("content") if said else None


def _texts(value: Any) -> list[str]:
    """A message's text, or the texts of its parts."""
    if isinstance(value, str):
        return [value]
    parts = value if isinstance(value, list) else []
    return [each["text"] for each in parts if isinstance(each, dict) and isinstance(each.get("text"), str)]
