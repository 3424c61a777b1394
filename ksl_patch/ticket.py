"""From test results to a ticket, and the control selections that a ticket is judged against."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from ksl_patch.errors import TicketError
from ksl_patch.kstest import KSResult, critical_statistic

Selection = Literal["ks", "frequency", "random", "l2"]
DEFAULT_CAP = 1024


@dataclass(frozen=True, eq=False)
class Ticket:
    """Selected token ids with the test's outcome for each, in ascending order of id.

    token_ids: int64 [k]; statistic, pvalue: float64 [k].
    selection: "ks" for a ticket by the test, else the control that selected the rows.
    """

    token_ids: np.ndarray
    statistic: np.ndarray
    pvalue: np.ndarray
    selection: Selection
    alpha: float | None
    top_k: int | None

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
    return _ticket(ids, result, "ks", alpha, top_k)


def frequency_ticket(result: KSResult, counts: np.ndarray, k: int) -> Ticket:
    """Control: the k token ids seen most often in training. counts: integers [V]."""
    order = np.argsort(-counts, kind="stable")
    return _ticket(np.sort(_seen(order, counts)[: _enough(counts, k)]), result, "frequency", None, k)


def random_ticket(result: KSResult, counts: np.ndarray, k: int, seed: int) -> Ticket:
    """Control: k token ids drawn without replacement among those seen in training. counts: integers [V]."""
    seen = np.flatnonzero(counts)
    ids = np.random.default_rng(seed).choice(seen, _enough(counts, k), replace=False)
    return _ticket(np.sort(ids), result, "random", None, k)


def l2_ticket(result: KSResult, before: torch.Tensor, after: torch.Tensor, k: int) -> Ticket:
    """Control: the k rows that moved farthest in Euclidean distance. before, after: [V, d]."""
    distance = torch.linalg.vector_norm(after.float() - before.float(), dim=1).numpy()
    if np.count_nonzero(distance) < k:
        raise TicketError(f"{k} rows were asked for, but only {np.count_nonzero(distance)} changed in training.")
    ids = np.sort(np.argsort(-distance, kind="stable")[:k])
    return _ticket(ids, result, "l2", None, k)


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
    return (
        f"the ticket is empty: no row has p < {alpha}. At {d} values a row D must be at least {critical:.4f}, which "
        f"takes an independent change of about {detectable_change(critical):.2f} times the row's own scale; the largest "
        f"D is {largest:.4f} (about {detectable_change(largest):.2f} times). Raise the learning rate or the steps of the "
        "embedding tuning, raise alpha, or use top_k to take the rows of largest D."
    )


def _seen(order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return order[counts[order] > 0]


def _enough(counts: np.ndarray, k: int) -> int:
    seen = np.count_nonzero(counts)
    if seen < k:
        raise TicketError(f"{k} rows were asked for, but only {seen} different tokens occur in training.")
    return k


def _ticket(ids: np.ndarray, result: KSResult, selection: Selection, alpha: float | None, top_k: int | None) -> Ticket:
    ids = ids.astype(np.int64)
    return Ticket(
        token_ids=ids,
        statistic=result.statistic[ids],
        pvalue=result.pvalue[ids],
        selection=selection,
        alpha=alpha,
        top_k=top_k,
    )
