"""Checks of rows named by hand, and warnings of rows that did not move; ticket.py chooses rows."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from ksl_patch.data.encoding import source_tokens
from ksl_patch.errors import RunError
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.terminal import counted
from ksl_patch.ticket import Ticket, given_ticket
from ksl_patch.train.material import Material

_LOOKED_AT = 64  # pairs, for what a template shows


def given(of: Material) -> Ticket:
    """The rows named by hand. Raises RunError where none of them gets a gradient."""
    config, ticket = of.config, given_ticket(of.config.rows, of.tokenizer, of.base.vocab_size)
    steps = config.steps if config.mode == "partial" else config.embed_steps
    unread = _unread(of, ticket, steps)
    if unread and (len(unread) == len(ticket) or config.mode == "transfer"):
        raise RunError(
            f"the training never reads {_named(of, unread)} where the patch acts, so there is nothing to train: name "
            "tokens of the prompt."
        )
    return ticket


def report_unread(of: Material, ticket: Ticket, steps: int) -> None:
    """Which of a ticket's rows none of the steps read that gave the patch its rows."""
    if unread := _unread(of, ticket, steps):
        message = (
            f"the {counted(steps, 'step')} of the patch's rows never read {_named(of, unread)} where it acts, so these "
            "stay the base's"
        )
        of.reporter.note("unread", message, token_ids=unread)


def _unread(of: Material, ticket: Ticket, steps: int) -> list[int]:
    """The token ids of a ticket that so many steps never read; the head of a patch of both sides learns of any."""
    if of.config.side == "input+output":
        return []
    return [int(i) for i in ticket.token_ids[of.counts_in(steps)[ticket.token_ids] == 0]]


def _named(of: Material, ids: list[int]) -> str:
    return ", ".join(f"{of.tokenizer.decode([i])!r} ({i})" for i in ids)


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
        if not set(ticket.token_ids.tolist()) & set(template_tokens(of, _LOOKED_AT)):
            message = (
                "no row of the ticket is of the template around the sentence: the patch acts where a sentence or "
                "an answer has these tokens, and nowhere else"
            )
            of.reporter.note("outside_template", message)


def template_tokens(of: Material, most: int | None = None) -> list[int]:
    """The ids, ascending, that training reads in prompts around the sentence and what else is filled in.

    most: look at so many pairs only. Raises RunError for a tokenizer that does not say which characters a token
    covers.
    """
    found: set[int] = set()
    for i in list(set(of.order(of.patch_steps)))[:most]:
        filled = source_tokens(of.tokenizer, of.template, of.train.pairs[i], fields=True)
        if filled is None:
            raise RunError(
                "the selection 'single' needs a fast tokenizer: others do not say which tokens are the template's."
            )
        prompt = of.train.examples[i].prompt
        found.update(token for token, inside in zip(prompt, filled, strict=True) if not inside)
    if not found:
        raise RunError("the template has no token of its own around the sentence: 'single' has nothing to choose.")
    return sorted(found)
