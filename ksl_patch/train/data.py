"""Sentence pairs: reading, splitting, templates and their token ids."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ksl_patch.errors import DataError, RunError
from ksl_patch.hf import prompt_ids
from ksl_patch.patch import TemplateMeta

IGNORED = -100  # transformers' label of a position without loss


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


class Example(NamedTuple):
    """A pair as token ids: the rendered prompt, then the answer with its end-of-sequence token."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Encoded:
    """Pairs and their token ids, in one order."""

    pairs: list[Pair]
    examples: list[Example]

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, n: int | None) -> Encoded:
        """The first n of them; all for None."""
        return Encoded(self.pairs[:n], self.examples[:n])

    @property
    def references(self) -> list[str]:
        """The translations to compare with."""
        return [pair.target for pair in self.pairs]

    @property
    def digest(self) -> str:
        """sha256 over the pairs."""
        return data_digest(self.pairs)


@dataclass(frozen=True)
class Pairs:
    """Pairs for training and held-out pairs; no source sentence occurs twice."""

    train: list[Pair]
    held_out: list[Pair]
    duplicates: int


def read_pairs(where: str, *, columns: tuple[str, str] = ("source", "target")) -> list[Pair]:
    """Read pairs from a .jsonl or .tsv file, or from a Hugging Face dataset.

    JSONL: one object a line with the two columns. TSV: source, tab, target; a first line with the column
    names is a header. Dataset: `id[:config[:split]]` with the columns, or with a `translation` column as
    the OPUS sets have. Raises DataError that names the line.
    """
    path = Path(where)
    if path.is_file():
        readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".tsv": _read_tsv, ".txt": _read_tsv}
        if path.suffix not in readers:
            raise DataError(f"{where}: the file's name must end in .jsonl or .tsv, so that its format is known.")
        try:
            pairs = list(readers[path.suffix](path, columns))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: cannot be read as UTF-8 text ({error}).") from error
    elif path.suffix in (".jsonl", ".json", ".tsv", ".txt"):
        raise DataError(f"{where}: no such file.")
    else:
        pairs = list(_read_dataset(where, columns))
    if not pairs:
        raise DataError(f"{where}: there are no sentence pairs in it.")
    return pairs


def split_pairs(pairs: Sequence[Pair], *, held_out: int, seed: int, limit: int | None = None) -> Pairs:
    """Shuffle under a seed, drop repeated sources, set `held_out` pairs aside, keep at most `limit` to train.

    The held-out pairs depend on the pairs, the seed and their own number alone, not on `limit`.
    """
    distinct = list({pair.source: pair for pair in reversed(pairs)}.values())
    distinct.sort()
    random.Random(seed).shuffle(distinct)
    if held_out >= len(distinct):
        raise DataError(
            f"{held_out} pairs are to be held out, but there are only {len(distinct)} with different sources; "
            "give more pairs or hold out fewer."
        )
    return Pairs(train=distinct[held_out:][:limit], held_out=distinct[:held_out], duplicates=len(pairs) - len(distinct))


def data_digest(pairs: Iterable[Pair]) -> str:
    """sha256 over the pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.source, pair.target]).encode() + b"\n")
    return digest.hexdigest()


def language_name(tag: str) -> str:
    """The English name of a BCP 47 language tag: "sw" -> "Swahili". Raises DataError."""
    import langcodes

    if not langcodes.tag_is_valid(tag):
        raise DataError(f"{tag!r} is not a known language; give a BCP 47 tag such as 'sw', 'pt-BR' or 'zh-Hant'.")
    return str(langcodes.get(tag).display_name("en"))


def make_template(kind: str, *, source_language: str, language: str, tokenizer: Any) -> TemplateMeta:
    r"""The prompt template: "plain", "chat" (the model's own chat template), or a text with `{source}`.

    In a text of one's own, `\n` stands for a line break.
    """
    source, target = language_name(source_language), language_name(language)
    if kind == "plain":
        return TemplateMeta(
            text=f"Translate this sentence from {source} to {target}.\n{source}: {{source}}\n{target}:", chat=False
        )
    if kind != "chat":
        text = kind.replace("\\n", "\n")
        if text.count("{source}") != 1:
            raise RunError("a template of your own must contain '{source}' exactly once, where the sentence goes.")
        return TemplateMeta(text=text, chat=False)
    if not getattr(tokenizer, "chat_template", None):
        raise RunError("this base has no chat template; use the plain template or a text of your own.")
    instruction = f"Translate this sentence from {source} to {target}.\n{{source}}"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
    )
    return TemplateMeta(text=text, chat=True)


def encode(template: TemplateMeta, pairs: Sequence[Pair], tokenizer: Any, end: int, max_length: int) -> Encoded:
    """Token ids of each pair; pairs longer than `max_length` tokens are left out.

    The prompt is tokenised exactly as it will be at generation; the answer is what follows it when prompt
    and target are tokenised together, wherever the tokenizer keeps the prompt's own tokens apart.
    """
    prompts = [template.render(pair.source) for pair in pairs]
    # An answer stands off by a space where the prompt does not end in white space: "Spanish:" -> " Hola".
    gap = "" if template.text[-1:].isspace() or template.chat else " "
    texts = [prompt + gap + pair.target for prompt, pair in zip(prompts, pairs, strict=True)]
    kept, examples = [], []
    for prompt, full, pair in zip(
        prompt_ids(tokenizer, prompts, chat=template.chat),
        prompt_ids(tokenizer, texts, chat=template.chat),
        pairs,
        strict=True,
    ):
        if full and full[-1] == end:  # a tokenizer that adds the end itself
            full = full[:-1]
        apart = full[: len(prompt)] == prompt
        answer = full[len(prompt) :] if apart else tokenizer(gap + pair.target, add_special_tokens=False).input_ids
        example = Example(prompt, [*answer, end])
        if len(example.prompt) + len(example.answer) <= max_length:
            kept.append(pair)
            examples.append(example)
    return Encoded(kept, examples)


def token_counts(examples: Iterable[Example], vocab_size: int) -> np.ndarray:
    """How often each token id is an input in training: int64 [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for example in examples:
        # The last token is only ever predicted.
        counts += np.bincount(example.prompt + example.answer[:-1], minlength=vocab_size)
    return counts


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A right-padded batch, int64 [B, T]: input_ids, attention_mask, and labels for the answer alone."""
    width = max(len(e.prompt) + len(e.answer) for e in examples)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(e.prompt + e.answer, pad) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * (len(e.prompt) + len(e.answer)), 0) for e in examples]),
        "labels": torch.tensor([padded([IGNORED] * len(e.prompt) + e.answer, IGNORED) for e in examples]),
    }


def _pair(record: Any, columns: tuple[str, str], where: str) -> Pair:
    if not isinstance(record, dict) or not set(columns) <= record.keys():
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: expected the columns {columns[0]!r} and {columns[1]!r}, found {found}.")
    pair = Pair(*(record[column] for column in columns))
    return _checked(pair, where)


def _checked(pair: Pair, where: str) -> Pair:
    if not all(isinstance(text, str) and text.strip() for text in pair):
        raise DataError(f"{where}: source and target must both be text that is not empty.")
    return Pair(pair.source.strip(), pair.target.strip())


def _read_jsonl(path: Path, columns: tuple[str, str]) -> Iterable[Pair]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}).") from error
            yield _pair(record, columns, where)


def _read_tsv(path: Path, columns: tuple[str, str]) -> Iterable[Pair]:
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for number, fields in enumerate(reader, start=1):
                if not fields or (number == 1 and tuple(fields) == columns):
                    continue
                where = f"{path}, line {number}"
                if len(fields) != 2:
                    raise DataError(f"{where}: expected source, tab, target; found {len(fields)} fields.")
                yield _checked(Pair(*fields), where)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}.") from error


def _read_dataset(where: str, columns: tuple[str, str]) -> Iterable[Pair]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: no such file; to read it as a Hugging Face dataset, pip install 'ksl-patch[datasets]'."
        ) from error

    name, config, split = islice([*where.split(":"), None, None], 3)
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds, its own and others'
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: neither a file nor a dataset that can be loaded ({reason}).") from error
    for number, record in enumerate(data, start=1):
        # OPUS sets hold {"translation": {"en": ..., "es": ...}}.
        inner = record.get("translation")
        yield _pair(inner if isinstance(inner, dict) else record, columns, f"{where}, row {number}")
