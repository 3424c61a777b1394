"""The selection "single": one row of the template's, by the dev loss of a patch of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ksl_patch.errors import RunError
from ksl_patch.ticket import Ticket
from ksl_patch.train.ticket_checks import template_tokens

if TYPE_CHECKING:
    from ksl_patch.train.build import Build


def single(of: Build) -> Ticket:
    """The row of the template whose patch has the lowest loss on the dev pairs; of equal ones the smallest id.

    A patch of each is trained as any other is, and kept. Raises RunError without dev pairs.
    """
    if not len(of.dev):
        raise RunError("the selection 'single' compares rows on the dev pairs, and there are none: give --dev.")
    candidates, losses = template_tokens(of), []
    for place, i in enumerate(candidates, start=1):
        loss = of.patched_loss(of.patch_of(Ticket(np.array([i]), "single")))
        losses.append(loss)
        of.reporter.note(
            "candidate",
            f"row {place} of {len(candidates)}, {of.tokenizer.decode([i])!r} ({i}), alone: loss {loss:.3f} on "
            f"{len(of.dev)} dev pairs",
            token_id=i,
            loss=loss,
        )
    return Ticket(np.array([candidates[int(np.argmin(losses))]]), "single")
