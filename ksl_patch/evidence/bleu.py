"""sacrebleu's BLEU: over Flores' pieces where their model is at hand, else over a language's words, with a note."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

# How BLEU cuts text in scripts that put no spaces between words, or are not to be cut at them: sacrebleu's tokenizers.
# The morphological ones are packages of their own, without which characters are counted.
_WORDS = {"Hans": "zh", "Hant": "zh", "Hani": "zh", "Jpan": "ja-mecab", "Kore": "ko-mecab", "Hang": "ko-mecab"}
_NO_SPACES = ("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Tale", "Talu", "Java", "Bali")


def _words(language: str | None) -> tuple[Any, list[str]]:
    import langcodes
    from sacrebleu.metrics import BLEU

    # "zho", "cmn" and "lzh" are written as "zh" is.
    script = langcodes.get(langcodes.standardize_tag(language, macro=True)).maximize().script if language else None
    name = _WORDS.get(script or "", "char" if script in _NO_SPACES else "13a")
    try:
        return BLEU(tokenize=name), []
    except RuntimeError:
        extra = name.partition("-")[0]
        note = f"BLEU is over characters, since sacrebleu's tokenizer {name} is not installed: pip install "
        return BLEU(tokenize="char"), [f"{note}'sacrebleu[{extra}]'."]


def bleu_metric(language: str | None) -> tuple[Any, list[str]]:
    """BLEU over Flores' pieces (spBLEU) where their model can be had, else over the language's words, with a note."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.utils import SACREBLEU_DIR

    model = Path(SACREBLEU_DIR) / "models" / "flores200sacrebleuspm"
    timeout = socket.getdefaulttimeout()
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not model.is_file():
            raise OSError("HF_HUB_OFFLINE is set")
        socket.setdefaulttimeout(10)  # sacrebleu downloads it without a limit of its own
        return BLEU(tokenize="flores200"), []
    except (Exception, SystemExit) as error:  # a network's many, and sacrebleu's own exit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        bleu, notes = _words(language)
        return bleu, [
            f"BLEU's words are those of sacrebleu's tokenizer {bleu.tokenizer_signature}; it is not spBLEU, whose "
            f"tokenizer model, which sacrebleu downloads, is not at hand ({reason}).",
            *notes,
        ]
    finally:
        socket.setdefaulttimeout(timeout)
