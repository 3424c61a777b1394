"""Which rows a patch changes (the ticket): by the test, by hand, or by a control; build.py picks the rule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from ksl_patch.errors import TicketError
from ksl_patch.kstest import KSResult, critical_statistic

Selection = Literal["ks", "frequency", "random", "l2", "single", "reserved", "given"]
DEFAULT_CAP = 1024


@dataclass(frozen=True, eq=False)
class Ticket:
    """Selected token ids in ascending order, int64 [k].

    selection: "ks" for a ticket by the test, "all" for every row that was trained, "given" for rows named by hand,
    "single" for the best row of the template's, "reserved" for rows of tokens that no text has, else the control that
    chose them.
    statistic, pvalue: the test's outcome for each, float64 [k]; None for a control, which needs no test.
    """

    token_ids: np.ndarray
    selection: Selection | Literal["all"]
    alpha: float | None = None
    top_k: int | None = None
    statistic: np.ndarray | None = None
    pvalue: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


def ks_ticket(
    result: KSResult, *, alpha: float | None = 0.05, top_k: int | None = None, cap: int = DEFAULT_CAP
) -> Ticket:
    """The rows whose distribution shifted.

    alpha: keep rows with p < alpha. top_k: keep the k rows of largest D (smallest id first among equals).
    Both: at most top_k of the rows with p < alpha. With alpha alone, more than `cap` rows are cut to the
    `cap` of largest D with a warning.

    Raises TicketError when no row qualifies, and says what change could have been significant.
    """
    if alpha is None and top_k is None:
        raise TicketError("give alpha, top_k or both: nothing says how many rows the ticket has.")
    if alpha is not None and not 0 < alpha <= 1:
        raise TicketError(f"alpha must be above 0 and at most 1, not {alpha}.")
    if top_k is not None and top_k < 1:
        raise TicketError(f"top_k must be at least 1, not {top_k}.")
    moved = result.statistic > 0
    chosen = moved if alpha is None else moved & (result.pvalue < alpha)
    candidates = np.flatnonzero(chosen)
    if not candidates.size:
        raise TicketError(_why_empty(result, alpha))
    largest_first = candidates[np.argsort(-result.statistic[candidates], kind="stable")]
    if top_k is None and len(largest_first) > cap:
        warnings.warn(
            f"{len(largest_first)} rows have p < {alpha}; the ticket keeps the {cap} of largest D. "
            "Lower alpha, or set top_k to choose the number yourself.",
            stacklevel=2,
        )
    ids = np.sort(largest_first[: top_k or cap])
    return Ticket(ids, "ks", alpha, top_k, result.statistic[ids], result.pvalue[ids])


def frequency_ticket(counts: np.ndarray, k: int) -> Ticket:
    """Control: the k token ids read most often in training. counts: integers [V]."""
    order = np.argsort(-counts, kind="stable")
    return Ticket(np.sort(order[: _enough(counts, k)]), "frequency", top_k=k)


def random_ticket(counts: np.ndarray, k: int, seed: int) -> Ticket:
    """Control: k token ids drawn without replacement among those that training read. counts: integers [V]."""
    seen = np.flatnonzero(counts)
    ids = np.random.default_rng(seed).choice(seen, _enough(counts, k), replace=False)
    return Ticket(np.sort(ids), "random", top_k=k)


def l2_ticket(token_ids: np.ndarray, distance: np.ndarray, k: int) -> Ticket:
    """Control: the k rows that moved farthest in Euclidean distance. token_ids: int64 [n], distance: float [n]."""
    if np.count_nonzero(distance) < k:
        raise TicketError(f"{k} rows were asked for, but only {np.count_nonzero(distance)} changed in training.")
    return Ticket(np.sort(token_ids[np.argsort(-distance, kind="stable")[:k]]), "l2", top_k=k)


def given_ticket(tokens: Sequence[str | int], tokenizer: Any, vocab_size: int) -> Ticket:
    """Rows named by hand: ids, names in the vocabulary such as "<bos>", or texts that are one token, such as "\\n".

    Raises TicketError for a text that is none or several tokens, and for an id without a row.
    """
    ids = []
    for token in tokens:
        found = [token] if isinstance(token, int) else _one_token(token, tokenizer)
        if len(found) != 1:
            parts = ", ".join(repr(tokenizer.decode([i])) for i in found)
            raise TicketError(f"{token!r} is {len(found)} tokens of this base ({parts}): name one token, or its id.")
        if not 0 <= found[0] < vocab_size:
            raise TicketError(f"token {found[0]} has no row: the table has the ids 0 to {vocab_size - 1}.")
        ids += found
    return Ticket(np.unique(np.array(ids, dtype=np.int64)), "given")


def _one_token(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text: one where it is one token, or where the vocabulary has it by name or by what it decodes to."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) == 1 and tokenizer.decode(ids) == text:
        return ids
    vocabulary = tokenizer.get_vocab()
    # A byte-level vocabulary calls bytes by the letters of Latin 1: such a letter is a text here, and no name.
    if text in vocabulary and (len(text) > 1 or "\ufffd" not in tokenizer.decode([vocabulary[text]])):
        return [vocabulary[text]]
    # A tokenizer may add a space before a text; the token itself then decodes to it.
    return next(([i] for i in sorted(vocabulary.values()) if tokenizer.decode([i]) == text), ids)


def detectable_change(statistic: float) -> float:
    """The independent change, as a multiple r of the row's own scale, that shifts D to `statistic`.

    A row of normal values with standard deviation 1 gets independent noise of standard deviation r; then
    D = sup_x |Phi(x) - Phi(x / sqrt(1 + r^2))|. Returns infinity when no r reaches it.
    """

    def shift(r: float) -> float:
        s2 = 1 + r * r
        x = np.sqrt(s2 * np.log(s2) / (s2 - 1))  # where the two densities cross
        return float(norm.cdf(x) - norm.cdf(x / np.sqrt(s2))) - statistic

    return float(brentq(shift, 1e-3, 1e6)) if shift(1e-3) < 0 < shift(1e6) else float("inf")


def _why_empty(result: KSResult, alpha: float | None) -> str:
    largest = float(result.statistic.max())
    if largest == 0:
        return "the ticket is empty: no row's distribution changed at all; were any rows trained?"
    assert alpha is not None  # with top_k alone, any row that moved qualifies
    d = result.hidden_size
    critical = critical_statistic(d, alpha)
    if critical is None:
        return (
            f"the ticket is empty: with {d} values a row, no D can have p < {alpha}, whatever the change; "
            "raise alpha or use top_k."
        )
    needed, seen = detectable_change(critical), detectable_change(largest)
    return (
        f"the ticket is empty: no row has p < {alpha}. At {d} values a row D must be at least {critical:.4f}, "
        f"which takes an independent change of about {needed:.2f} times the row's own scale; the largest "
        f"D is {largest:.4f} (about {seen:.2f} times). Raise the learning rate or the steps of the embedding tuning, "
        "raise alpha, or use top_k to take the rows of largest D."
    )


def _enough(counts: np.ndarray, k: int) -> int:
    seen = int(np.count_nonzero(counts))
    if seen < k:
        raise TicketError(f"{k} rows were asked for, but training read only {seen} different tokens.")
    return k
