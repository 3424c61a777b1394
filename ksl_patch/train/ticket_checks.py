"""Checks of rows named by hand, and warnings of rows that did not move; ticket.py chooses rows."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from ksl_patch.errors import RunError
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.terminal import counted
from ksl_patch.ticket import Ticket, given_ticket
from ksl_patch.train.material import Material

_LOOKED_AT = 64  # pairs, for what a template shows


def given(of: Material, counts: np.ndarray) -> Ticket:
    """The rows named by hand. Raises RunError where none of them gets a gradient, and says which do not.

    counts: how often training reads each token where the patch acts, int64 [V].
    """
    ticket = given_ticket(of.config.rows, of.tokenizer, of.base.vocab_size)
    if of.config.side == "input+output":
        return ticket
    unread = ticket.token_ids[counts[ticket.token_ids] == 0]
    if len(unread):
        names = ", ".join(f"{of.tokenizer.decode([i])!r} ({i})" for i in unread)
        what = f"the training never reads {names} where the patch acts"
        if len(unread) == len(ticket) or of.config.mode == "transfer":
            raise RunError(f"{what}, so there is nothing to train: name tokens of the prompt.")
        of.reporter.note("unread", f"{what}, so these rows stay the base's", token_ids=unread.tolist())
    return ticket


def report_weak_rows(of: Material, ticket: Ticket) -> None:
    """Of a ticket, which rows the test does not call moved, and whether the template has any of them."""
    level = of.config.alpha or DEFAULT_ALPHA
    pvalues = np.zeros(0) if ticket.pvalue is None else ticket.pvalue
    if weak := int((pvalues >= level).sum()):
        message = (
            f"{weak} of these {counted(len(ticket), 'row')} did not move by the test (p >= {level:g}, up to "
            f"{pvalues.max():.2g}): --top-k alone takes them all the same, and --alpha {level:g} beside it does not"
        )
        of.reporter.note("weak_rows", message, rows=weak, alpha=level)
    with suppress(RunError):  # a slow tokenizer, or a template without words
        if not set(ticket.token_ids.tolist()) & set(of.template_tokens(_LOOKED_AT)):
            message = (
                "no row of the ticket is of the template around the sentence: the patch acts where a sentence or "
                "an answer has these tokens, and nowhere else"
            )
            of.reporter.note("outside_template", message)
