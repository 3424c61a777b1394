"""A patch beside the base, the tuned embedding it came from, and the controls it must beat to mean anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ksl_patch.errors import DataError, RunError
from ksl_patch.evidence import CONTROLS, Evaluation, Sample, SystemScores
from ksl_patch.hf import end_token_id
from ksl_patch.patch import Patch
from ksl_patch.train.build import Build
from ksl_patch.train.data import Encoded, Pair, encode
from ksl_patch.train.evaluate import Outputs, Scorer, run
from ksl_patch.train.progress import Reporter

_SAMPLES = 6
_SAMPLE_CHARACTERS = 600  # the text of a model that does not stop is long


def noise_patch(patch: Patch, seed: int) -> Patch:
    """Control: the patch's rows moved from the base's in a random direction, each as far as the patch moves it."""
    base = patch.base_rows.float()
    direction = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    length = (patch.rows.float() - base).norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
    return replace(patch, rows=(base + direction * length).to(patch.rows.dtype), output_rows=None)


def make_systems(
    patch: Patch, build: Build | None, controls: Sequence[str] = CONTROLS, seeds: int = 1
) -> dict[str, dict[int, Patch]]:
    """The systems to evaluate, by name and training seed: the patch, the tuned embedding, the controls.

    The first seed is the patch's own; the build trains what is not in its run folder yet. Without a build there is
    the patch, and the random change. A control has as many rows as the patch of its seed, and the same training.
    """
    own = patch.meta.training.seed if patch.meta.training else 0
    if build is None:
        if seeds > 1:
            raise RunError("several training seeds need the run folder of the patch's build.")
        return {"patch": {own: patch}} | ({"noise": {own: noise_patch(patch, own)}} if "noise" in controls else {})
    systems: dict[str, dict[int, Patch]] = {}
    selection = build.config.selection
    for seed in range(own, own + seeds):
        seeded = build if seed == own else build.seeded(seed)
        this = patch if seed == own else seeded.patch_of(seeded.ticket())
        made = {"patch": this}
        k = len(this.token_ids)
        for name in ("frequency", "random"):
            if name in controls and name != selection:
                made[name] = seeded.patch_of(seeded.ticket(name, k))  # type: ignore[arg-type]
        if seeded.is_embedding_tuned:
            made["embedding"] = seeded.embedding_patch()
            if "l2" in controls and selection != "l2":
                made["l2"] = seeded.patch_of(seeded.ticket("l2", k))
        else:
            build.reporter.note(
                "left_out",
                "the run folder has no tuned embedding, since the selection needs none: it is left out, and so is the "
                "control l2, which is chosen from it",
            )
        if "noise" in controls:
            made["noise"] = noise_patch(this, seed)
        for name, system in made.items():
            systems.setdefault(name, {})[seed] = system
    return systems


def evaluate(
    model: Any,
    tokenizer: Any,
    held_out: Encoded,
    systems: dict[str, dict[int, Patch]],
    reporter: Reporter,
    *,
    max_new_tokens: int = 128,
    cache: Path | None = None,
    resamples: int = 1000,
) -> Evaluation:
    """Run every system and the base on held-out pairs, and score them; see `Scorer` for the intervals.

    cache: a folder in which finished runs are kept, so that an evaluation that was cut off continues.
    """
    scorer = Scorer(held_out.references, resamples=resamples)

    def of(patch: Patch | None) -> Outputs:
        return run(model, tokenizer, held_out, patch, max_new_tokens=max_new_tokens, cache=cache)

    reporter.begin("evaluation", 1 + sum(map(len, systems.values())))
    base, done = of(None), 1
    reporter.step(done)
    scores = [SystemScores(name="base", rows=[0], seeds=[], figures=scorer.of_base(base))]
    runs: dict[str, list[Outputs]] = {}
    for name, patches in systems.items():
        for patch in patches.values():
            runs.setdefault(name, []).append(of(patch))
            reporter.step(done := done + 1)
        scores.append(
            SystemScores(
                name=name,
                rows=[len(patch.token_ids) for patch in patches.values()],
                seeds=list(patches),
                figures=scorer.figures(runs[name], base),
            )
        )
    reporter.end()
    return Evaluation(
        pairs=len(held_out),
        data_digest=held_out.digest,
        loss_base=scores[0].figures["loss"].value,
        loss_patch=next(each for each in scores if each.name == "patch").figures["loss"].per_seed[0],
        max_new_tokens=max_new_tokens,
        confidence=scorer.confidence,
        resamples=scorer.resamples,
        signatures=scorer.signatures,
        notes=scorer.notes,
        systems=scores,
        samples=[
            Sample(
                source=pair.source,
                reference=pair.target,
                base=before[:_SAMPLE_CHARACTERS],
                patch=after[:_SAMPLE_CHARACTERS],
            )
            for pair, before, after in zip(held_out.pairs, base.texts, runs["patch"][0].texts, strict=True)
        ][:_SAMPLES],
    )


def encode_test(patch: Patch, model: Any, tokenizer: Any, pairs: list[Pair], build: Build | None) -> Encoded:
    """Other pairs than the build's held-out ones, in the patch's template.

    Raises DataError when the build trained on some of them, RunError for a patch without a template.
    """
    if build is not None:
        trained = {pair.source for pair in build.pairs.train}
        seen = sum(pair.source in trained for pair in pairs)
        if seen:
            raise DataError(
                f"{seen} of the {len(pairs)} test pairs are in the patch's own training data, so they say nothing "
                "about new text; give pairs that no training saw."
            )
        return build.encode(pairs, "test")
    if patch.meta.template is None:
        raise RunError("the patch names no prompt template, so there is nothing to put the sentences into.")
    return encode(patch.meta.template, pairs, tokenizer, end_token_id(model, tokenizer), 2**20)
