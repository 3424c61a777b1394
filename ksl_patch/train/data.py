"""Sentence pairs: splitting, templates and their token ids."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ksl_patch.errors import DataError, RunError
from ksl_patch.hf import prompt_ids
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.names import check_fields
from ksl_patch.train.pairs import Pair as Pair
from ksl_patch.train.reading import Columns as Columns
from ksl_patch.train.reading import read_pairs as read_pairs

IGNORED = -100  # transformers' label of a position without loss


class Example(NamedTuple):
    """A pair as token ids: the rendered prompt, then the answer with the token that ends it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Encoded:
    """Pairs and their token ids, in one order, and the template that they were put into."""

    pairs: list[Pair]
    examples: list[Example]
    template: TemplateMeta

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, n: int | None) -> Encoded:
        """The first n of them; all for None."""
        return replace(self, pairs=self.pairs[:n], examples=self.examples[:n])

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest reference, with its end."""
        return max(len(example.answer) for example in self.examples)

    @property
    def groups(self) -> list[str] | None:
        """The document of each pair; None where they have none."""
        groups = [pair.group for pair in self.pairs]
        return groups if any(groups) else None

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
    """Pairs for training, for choices between patches (dev), and for the figures (held_out).

    No source is in two of them. duplicates: how many were left out since their source occurs before. unused: how many
    belong to what is held out (a document, a source) and are not measured.
    """

    train: list[Pair]
    dev: list[Pair]
    held_out: list[Pair]
    duplicates: int
    unused: int


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each source, by `Pair.key`, with the same fields."""
    first: dict[tuple[Any, ...], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.key, pair.fields), pair)
    return list(first.values())


def split_pairs(pairs: Sequence[Pair], *, held_out: int, dev: int = 0, seed: int = 0) -> Pairs:
    """Drop repeated sources, set `held_out` and `dev` pairs aside, keep the others to train.

    A hash of a pair's source, or of its document where it has one, says on which side it is: another pair in the file
    moves no more than itself and one at each border. No document is on two sides. What is set aside is in turns from
    its documents, so that the first of it are of as many as there are.
    """
    kept = distinct(pairs)

    def place(pair: Pair) -> tuple[bytes, bytes]:
        document = f"document {pair.group}" if pair.group else f"sentence {pair.key}"
        first, then = (hashlib.sha256(f"{seed}\n{text}".encode()).digest() for text in (document, pair.key))
        return first, then

    kept.sort(key=place)
    parts: list[list[Pair]] = []
    begin = 0
    for wanted in (held_out, dev):
        end = begin + wanted
        while wanted and 0 < end < len(kept) and place(kept[end])[0] == place(kept[end - 1])[0]:
            end += 1  # to the end of the document, or of what has this source
        parts.append(_by_turns(kept[begin:end]))
        begin = end
    if begin >= len(kept):
        n = len({pair.group for pair in kept})
        documents = f" in {n} document{'s' if n > 1 else ''}, which stay whole" if any(p.group for p in kept) else ""
        raise DataError(
            f"{held_out} pairs are to be held out and {dev} kept for choices, but there are only {len(kept)} with "
            f"different sources{documents}; give more pairs or hold out fewer (--held-out, --dev)."
        )
    # One source may be in several documents, with other fields: it is on the side of the figures, then of the choices.
    test = parts[0][:held_out]
    known = {pair.key for pair in parts[0]}
    choice = [pair for pair in parts[1] if pair.key not in known][:dev]
    known |= {pair.key for pair in parts[1]}
    train = [pair for pair in kept[begin:] if pair.key not in known]
    return Pairs(
        train=train,
        dev=choice,
        held_out=test,
        duplicates=len(pairs) - len(kept),
        unused=len(kept) - len(train) - len(test) - len(choice),
    )


def _by_turns(pairs: Sequence[Pair]) -> list[Pair]:
    """Of each document its first pair, then of each its second; a pair without a document is one by itself."""
    seen = Counter[str]()
    turns = []
    for pair in pairs:
        turns.append(seen[pair.group])
        seen[pair.group] += bool(pair.group)
    return [pairs[i] for i in sorted(range(len(pairs)), key=turns.__getitem__)]


def reading_order(pairs: int, reads: int, seed: int) -> list[int]:
    """Which pair each of `reads` reads takes: all of them in a random order, then in another; a shorter one's is a
    longer one's beginning.
    """
    random = np.random.default_rng(seed)
    passes: Iterator[list[int]] = (random.permutation(pairs).tolist() for _ in range(-(-reads // pairs)))
    return list(islice(chain.from_iterable(passes), reads))


_SKETCH, _HASH = 1024, 5  # hashes that are kept, and bytes of each


def pair_hash(pair: Pair) -> bytes:
    """5 bytes that a pair's source gives; see `Pair.key`."""
    return hashlib.sha256(pair.key.encode()).digest()[:_HASH]


def sketch(pairs: Iterable[Pair]) -> str:
    """Hashes of the pairs' sources, 5 bytes each, in base64: all of up to 1,024, else the smallest 1,024."""
    return base64.b64encode(b"".join(sorted(set(map(pair_hash, pairs)))[:_SKETCH])).decode()


def seen(kept: str, pairs: Iterable[Pair]) -> tuple[int, bool]:
    """How many pairs have a source that is in the sketch `kept`, and whether that holds all of its sources.

    Raises DataError when it is no sketch.
    """
    try:
        content = base64.b64decode(kept, validate=True)
    except ValueError as error:
        raise DataError(f"the patch's hashes of its training sentences cannot be read ({error}).") from error
    known = {content[i : i + _HASH] for i in range(0, len(content), _HASH)}
    return sum(pair_hash(pair) in known for pair in pairs), len(known) < _SKETCH


def data_digest(pairs: Iterable[Pair]) -> str:
    """sha256 over the pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.source, pair.target, *map(list, pair.fields)]).encode() + b"\n")
    return digest.hexdigest()


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
    if same_language(source, target):
        raise RunError(f"source and target are both {names[1]}: name another language.")


def same_language(one: str, other: str) -> bool:
    """Whether two BCP 47 tags are of one language in one script and region."""
    return _standard(one) == _standard(other)


def _standard(tag: str) -> str:
    """A tag in its shortest form, an extended language by its own: "zh-yue" is "yue"."""
    import langcodes

    try:
        return str(langcodes.standardize_tag(tag))
    except ValueError:
        return tag


def make_template(
    kind: str,
    *,
    source_language: str,
    language: str,
    tokenizer: Any,
    system: str | None = None,
    instruction: bool = True,
) -> TemplateMeta:
    r"""The prompt template: "plain", "chat" (the model's own chat template), or a text with `{source}`.

    In a text of one's own, `\n` stands for a line break, and any other `{name}` for a column of the pairs.
    system: a chat's system prompt, which may name columns too. instruction: whether a chat's user asks for a
    translation of the sentence; else the sentence is all that the user says.
    """
    source, target = language_name(source_language), language_name(language)
    if system is not None and "{source}" in system:
        raise RunError("the sentence goes into the user's message: remove {source} from the system prompt.")
    fields = template_fields(kind, system) or None
    if kind == "plain":
        return TemplateMeta(
            text=f"Translate this sentence from {source} to {target}.\n{source}: {{source}}\n{target}:", chat=False
        )
    if kind != "chat":
        text = kind.replace("\\n", "\n")
        if text.count("{source}") != 1:
            raise RunError("a template of your own must contain '{source}' exactly once, where the sentence goes.")
        return TemplateMeta(text=text, chat=False, fields=fields)
    if not getattr(tokenizer, "chat_template", None):
        raise RunError("this base has no chat template; use the plain template or a text of your own.")
    messages = [] if system is None else [{"role": "system", "content": system.replace("\\n", "\n")}]
    asked = f"Translate this sentence from {source} to {target}.\n" if instruction else ""
    messages.append({"role": "user", "content": f"{asked}{{source}}"})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, end = turn_around(tokenizer, messages, text)
        probe = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}], tokenize=False)
    except Exception as error:  # the template's own words, in an exception of jinja's or of another kind
        raise RunError(f"this base's chat template refuses the messages ({error}).") from error
    kept = all(message["content"].strip() in text for message in messages) and _PROBE in probe
    if not kept or text.count("{source}") != 1:
        raise RunError(
            "this base's chat template does not keep the messages as they are (it may know no system prompt); "
            "use a text of your own."
        )
    if before.strip():  # an empty block of thoughts, say, which the answer comes after
        text, before = text + before, ""
    return TemplateMeta(
        text=text,
        chat=True,
        fields=fields,
        end_token_id=None if end == tokenizer.eos_token_id else end,
        before_answer=before or None,
    )


def template_fields(kind: str, system: str | None) -> list[str]:
    """The columns beside the source that a template of this kind names. Raises PatchError for what cannot be one."""
    if system is not None and kind != "chat":
        raise RunError("a system prompt is for the chat template: add --template chat, or put it into the template.")
    text = (system or "") if kind in ("plain", "chat") else kind
    names = re.findall(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", text)
    fields = [name for name in dict.fromkeys(names) if name != "source"]
    check_fields(fields)
    return fields


_PROBE = "a <b> & \"c\" - 'd'"  # what a template may escape or rewrite


def turn_around(tokenizer: Any, messages: list[dict[str, str]], prompt: str) -> tuple[str, int | None]:
    """What the chat template puts between a prompt and an assistant's answer, and the token that it puts after it.

    messages: what the prompt is the rendering of. "" and None where the template does not tell.
    """
    answer = [{"role": "assistant", "content": _PROBE}]
    before, found, after = tokenizer.apply_chat_template([*messages, *answer], tokenize=False).rpartition(_PROBE)
    if not found:
        return "", None
    head = tokenizer.apply_chat_template(messages, tokenize=False)
    begin = prompt[len(head) :] if prompt.startswith(head) else ""
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
    special |= {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.bos_token_id
    }
    special -= set(tokenizer(begin, add_special_tokens=False).input_ids)  # what begins a turn ends none
    end = next((i for i in tokenizer(after, add_special_tokens=False).input_ids if i in special), None)
    return before.removeprefix(prompt) if before.startswith(prompt) else "", end


def encode(template: TemplateMeta, pairs: Sequence[Pair], tokenizer: Any, end: int, max_length: int) -> Encoded:
    """Token ids of each pair; pairs longer than `max_length` tokens are left out.

    The prompt is tokenised exactly as it will be at generation; the answer is what follows it when prompt
    and target are tokenised together, wherever the tokenizer keeps the prompt's own tokens apart, and `end` unless
    the template names another.
    """
    end = end if template.end_token_id is None else template.end_token_id
    prompts = [pair.prompt(template) for pair in pairs]
    # An answer stands off by a space where the prompt does not end in white space: "Spanish:" -> " Hola".
    gap = (template.before_answer or "") if template.chat else "" if template.text[-1:].isspace() else " "
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
    return Encoded(kept, examples, template)


def source_tokens(tokenizer: Any, template: TemplateMeta, pair: Pair, *, fields: bool = False) -> list[bool] | None:
    """Which tokens of the rendered prompt cover a character of the source sentence; None where a tokenizer cannot say.

    What it adds by itself, such as a token of the beginning, covers none. fields: or a character of another column.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    values, pieces = {**dict(pair.fields), "source": pair.source}, template.pieces()
    texts = [values[piece] if i % 2 else piece for i, piece in enumerate(pieces)]
    ends = list(accumulate(map(len, texts)))
    filled = [i for i in range(1, len(pieces), 2) if fields or pieces[i] == "source"]
    encoded = tokenizer(pair.prompt(template), add_special_tokens=not template.chat, return_offsets_mapping=True)
    return [
        # A token of spaces may cover nothing, at its place; what a tokenizer adds covers nothing at an end.
        any(first < ends[i] and last > ends[i - 1] for i in filled)
        for first, last in encoded.offset_mapping
    ]


def token_counts(examples: Iterable[Example], vocab_size: int, *, prompt_only: bool = False) -> np.ndarray:
    """How often each token id is an input where a patch acts: int64 [V]. prompt_only: of scope "prompt".

    Raises DataError for an id that the table has no row for.
    """
    # The last token is only ever predicted.
    inputs = ([*e.prompt, *(() if prompt_only else e.answer[:-1])] for e in examples)
    counts = np.bincount(np.fromiter(chain.from_iterable(inputs), dtype=np.int64), minlength=vocab_size)
    check_ids([[len(counts) - 1]], vocab_size)
    return counts


def check_ids(sequences: Iterable[Iterable[int]], vocab_size: int) -> None:
    """Raise DataError for a token id that a table of so many rows has not."""
    largest = max(chain.from_iterable(sequences), default=0)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, and the base's table has {vocab_size} rows: the tokenizer is not "
            "this base's."
        )


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
