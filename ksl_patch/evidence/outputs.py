"""What a model does on pairs, with a patch or without: greedy outputs and losses, kept in a run folder.

Raw output, first line, stopping and length are separate figures: one number that mixes them misleads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksl_patch.base.tensors import dtype_name
from ksl_patch.data.encoding import Encoded, Example
from ksl_patch.hf import Completion, attach, generate
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.train.build import Build
from ksl_patch.train.loss import answer_losses
from ksl_patch.train.progress import Reporter, SilentReporter
from ksl_patch.train.record import keep


@dataclass(frozen=True)
class Outputs:
    """What one system did on each held-out pair.

    losses: nats, summed over the tokens of the reference; tokens: how many those are.
    token_ids: of the greedy output.
    """

    texts: list[str]
    stopped: list[bool]
    losses: list[float]
    tokens: list[int]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class Cache:
    """A folder where outputs are kept and found again, by all that they depend on. base: the model's `model_digest`."""

    folder: Path
    base: str

    @classmethod
    def of(cls, build: Build) -> Cache:
        """That of a build's run folder."""
        return cls(build.run / "outputs", build.loaded.digest)

    def file(self, *key: Any) -> Path:
        """The file of a result that depends on the key besides."""
        text = json.dumps([_OUTPUTS, self.base, *key])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


_OUTPUTS = 3  # counts what the form or the meaning of kept outputs was


def token_limit(held_out: Encoded) -> int:
    """How many tokens an output may have by default: half as many again as the longest reference, at least 32."""
    return max(32, 16 * math.ceil(1.5 * held_out.longest_answer / 16))


def translate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    patch: Patch | None,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy output for the prompt of each example, with a patch or, for None, the base.

    What ends the examples' answers ends an output too. advance: is told how many more have their output.
    """
    prompts = [example.prompt for example in examples]
    return generate(
        model, tokenizer, prompts, [patch] * len(prompts), max_new_tokens=max_new_tokens, batch_size=batch_size,
        ends=[example.answer[-1] for example in examples], advance=advance,
    )  # fmt: skip


def outputs_of(
    model: Any,
    tokenizer: Any,
    held_out: Encoded,
    patch: Patch | None,
    *,
    max_new_tokens: int,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    stage: str = "",
) -> Outputs:
    """What the model does with a patch, or, for None, by itself. reporter: is told of it as `stage`."""
    reporter, done = reporter or SilentReporter(), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        reporter.step(done)

    file = None
    if cache is not None:
        file = cache.file(
            patch.digest if patch else None, dtype_name(model.dtype), model.device.type, max_new_tokens,
            held_out.digest, held_out.examples,
        )  # fmt: skip
        with suppress(OSError, ValueError, TypeError):  # none yet, or one that was cut
            return Outputs(**json.loads(file.read_bytes()))
    reporter.begin(stage, len(held_out))
    with attach(model) as handle:
        slot = 0 if patch is None else handle.bank.add(slot_rows(patch))
        with handle.serving(slot):
            losses, tokens = answer_losses(model, held_out.examples, marking=handle.marking)
    completions = translate(model, tokenizer, held_out.examples, patch, max_new_tokens=max_new_tokens, advance=advance)
    reporter.end()
    outputs = of_completions(completions, losses, tokens)
    if file is not None:
        keep(file, json.dumps(asdict(outputs), ensure_ascii=False).encode())
    return outputs


def of_completions(completions: Sequence[Completion], losses: list[float], tokens: list[int]) -> Outputs:
    """Greedy outputs and losses of the references, together."""
    return Outputs(
        texts=[completion.text.strip() for completion in completions],
        stopped=[completion.stopped for completion in completions],
        losses=losses,
        tokens=tokens,
        token_ids=[list(completion.token_ids) for completion in completions],
    )
