"""The selection "reserved": which tokens that no text has, where their training starts, and that prompts reach them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

import torch

from ksl_patch.base import find_embedding
from ksl_patch.base.reserved import names_in
from ksl_patch.data.encoding import Encoded
from ksl_patch.data.templates import make_template
from ksl_patch.errors import BaseMismatchError, RunError
from ksl_patch.hf import prompt_ids
from ksl_patch.interop.checkpoint import ids_inside
from ksl_patch.store.references import load
from ksl_patch.terminal import counted
from ksl_patch.train.config import BuildConfig

if TYPE_CHECKING:
    from ksl_patch.train.material import Material


def check_settings(config: BuildConfig) -> None:
    """Raise RunError for what reserved rows cannot be."""
    if config.selection != "reserved" or config.rows:
        if config.beside:
            raise RunError("other patches' tokens are left alone (beside) by the selection 'reserved' only.")
        return
    if config.top_k is None:
        raise RunError("the selection 'reserved' needs top_k: nothing else says how many rows to take.")
    if config.side != "input":
        raise RunError("reserved rows act where a prompt has their tokens: the selection 'reserved' has side 'input'.")
    if config.scope != "all":
        raise RunError("reserved rows act in prompts alone as it is: the selection 'reserved' has scope 'all'.")
    if config.mode != "partial":
        raise RunError("reserved rows are tuned alone: the selection 'reserved' has mode 'partial'.")


def choose(of: Material) -> list[str]:
    """The names of `top_k` reserved tokens, those of the smallest ids that nothing else has.

    Neither the pairs, nor the patches that it is built beside or that are in the base already, nor the template as it
    was given. Raises RunError where
    there are fewer, with how many there are.
    """
    config, reserved = of.config, of.reserved
    if own := reserved.named_in([config.template, config.system or ""]):
        raise RunError(
            f"the template names {sorted(own)[0]} itself: {{reserved}} says where reserved tokens go, and which they "
            "are is chosen; or name the rows with --rows."
        )
    texts = (text for pair in of.read for text in (pair.source, pair.target, *(value for _, value in pair.fields)))
    taken, others = names_in(texts), _beside(of) | ids_inside(of.model)
    free = (i for i in reserved if i not in others and reserved.name(i).lower() not in taken)
    assert config.top_k is not None
    ids = list(islice(free, config.top_k))
    if len(ids) < config.top_k:
        found = list(reserved)
        left = f", {len(ids)} of which nothing else has" if len(ids) < len(found) else ""
        have = (
            f"{counted(len(found), 'reserved token')}{left}"
            if found
            else "no reserved token: no name in its vocabulary says so, as <unused5> would"
        )
        raise RunError(f"{counted(config.top_k, 'row')} asked for, and this base has {have}.")
    return [reserved.name(i) for i in ids]


def _beside(of: Material) -> set[int]:
    """The token ids of the patches that it is built beside. Raises BaseMismatchError for a patch of another base."""
    found: set[int] = set()
    for reference in of.config.beside:
        patch = load(reference)
        patch.check_table(find_embedding(of.model))
        if patch.meta.base.fingerprint != of.base.fingerprint:
            raise BaseMismatchError(
                f"{reference} is of a base that has other rows elsewhere, so the two could not be merged: build both "
                "on the same base."
            )
        patch.check_vocabulary(of.tokenizer)
        found.update(patch.token_ids.tolist())
    return found


def positions(of: Material) -> int:
    """How many tokens of the template are reserved ones, each as often as it stands there.

    Raises RunError where the tokenizer does not read them in the template as it does alone.
    """
    template, count = of.template, 0
    ids = prompt_ids(of.tokenizer, [template.text], chat=template.chat)[0] if of.reserved_ids else []
    for i in of.reserved_ids:
        name = of.reserved.name(i)
        wanted, found = template.text.count(name), ids.count(i)
        if found != wanted:
            raise RunError(
                f"the tokenizer reads {name!r} {found} times in a template that has it {wanted} times, so its row "
                "would not be reached: put {reserved} elsewhere."
            )
        count += found
    return count


def check_reached(ids: Collection[int], pairs: Encoded, each: int) -> None:
    """Raise RunError for a pair whose tokens have these reserved ones otherwise than its template, `each` times."""
    ids = set(ids)
    for pair, example in zip(pairs.pairs, pairs.examples, strict=True):
        if sum(token in ids for token in example.prompt) != each or not ids.isdisjoint(example.answer):
            raise RunError(
                f"the tokenizer finds other reserved tokens in the pair {pair.source[:60]!r} than its template has: "
                "remove their names from the pairs, or put {reserved} elsewhere."
            )


def start_ids(of: Material, k: int) -> list[int] | None:
    """The tokens whose rows the training of k reserved rows starts from: the instruction's, over and over.

    They are those of the prompt that the base alone would have, the plain one's where that says nothing. None to start
    from the reserved rows as they are. After Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning"
    (2021).
    """
    if of.config.start == "base":
        return None
    config, tokenizer = of.config, of.tokenizer
    plain = make_template(
        "plain", source_language=config.source_language, language=config.language, tokenizer=tokenizer
    )
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for template in (of.template.of_base(), plain):
        texts = prompt_ids(tokenizer, template.pieces()[::2], chat=True)
        if words := [i for ids in texts for i in ids if i not in marks]:
            break
    return [words[place % len(words)] for place in range(k)]


def start_rows(of: Material, token_ids: torch.Tensor) -> torch.Tensor | None:
    """Those rows for token_ids int64 [k], float32 [k, d] on the CPU; None to start from the base's own."""
    ids = start_ids(of, len(token_ids))
    return None if ids is None else of.base_rows(torch.tensor(ids))
