"""Several patches beside each other, as the page shows them: their settings, their figures, the tokens they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Evaluation, read
from ksl_patch.patch.wording import level_of
from ksl_patch.report.figures import dots

_COLUMNS = 4  # patches side by side; more stand in lines


def compare(patches: Sequence[Patch]) -> dict[str, Any]:
    """Several patches beside each other: their figures, and the tokens that they share."""
    names = [patch.meta.name for patch in patches]
    evaluations = [read(Evaluation, patch.meta.evaluation) for patch in patches]
    scores = [
        next((system.figures for system in evaluation.systems if system.name == "patch"), {}) if evaluation else {}
        for evaluation in evaluations
    ]
    ids = [set(patch.token_ids.tolist()) for patch in patches]
    facts = _facts(patches, evaluations)
    return {
        "names": names,
        "same": [(label, values[0]) for label, values in facts if len(set(values)) == 1 and values[0]],
        "facts": [(label, values) for label, values in facts if len(set(values)) > 1],
        "listed": len(patches) > _COLUMNS,
        "unmeasured": [name for name, found in zip(names, scores, strict=True) if not found],
        "level": level_of([e.confidence for e in evaluations if e and e.systems and e.confidence]),
        "dots": dots("all", [(name, found, "patch") for name, found in zip(names, scores, strict=True)]),
        "shared": [[str(len(a & b)) for b in ids] for a in ids],
        "same_data": len(
            {
                (e.data_digest, e.max_new_tokens, str(patch.meta.template))
                for e, patch in zip(evaluations, patches, strict=True)
                if e
            }
        )
        <= 1,
    }


def _facts(patches: Sequence[Patch], evaluations: Sequence[Evaluation | None]) -> list[tuple[str, list[str]]]:
    """What may be other in each patch: a label, and a text for each."""
    return [
        ("language", [patch.meta.language or "" for patch in patches]),
        ("base", [f"{patch.meta.base.model_id or ''} {patch.meta.base.fingerprint[:12]}" for patch in patches]),
        ("rows", [str(len(patch.token_ids)) for patch in patches]),
        ("digest", [patch.digest[:12] for patch in patches]),
        ("rows chosen by", [patch.meta.ticket.rule if patch.meta.ticket else "" for patch in patches]),
        ("training", [_training(patch) for patch in patches]),
        ("prompt", [patch.meta.template.text if patch.meta.template else "" for patch in patches]),
        ("measured on", [evaluation.what if evaluation else "" for evaluation in evaluations]),
        ("new tokens, at most", [str((e and e.max_new_tokens) or "not generated") for e in evaluations]),
        (
            "loss, base → patch",
            [f"{e.loss_base:.3f} → {e.loss_patch:.3f}" if e else "" for e in evaluations],
        ),
    ]


def _training(patch: Patch) -> str:
    """What of a patch's training may be other than in another's."""
    t = patch.meta.training
    if t is None:
        return ""
    damped = t.hyperparameters.get("damp_rare") if t.hyperparameters else None
    damped = "" if damped is None else f", rare rows damped: {damped}"
    return (
        f"{t.mode}, scope {patch.meta.scope}, {t.tunings}, batch {t.batch_size}, {t.optimiser}, seed {t.seed}{damped}"
    )
