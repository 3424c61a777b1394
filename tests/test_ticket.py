"""Which rows make a ticket, and which the controls take."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ksl_patch import ks_test, ks_ticket
from ksl_patch.errors import TicketError
from ksl_patch.kstest import KSResult
from ksl_patch.ticket import detectable_change, frequency_ticket, l2_ticket, random_ticket


@pytest.fixture
def result():
    """Rows 0 to 19 of 256 values; row i got noise of i/10 times its own scale."""
    g = torch.Generator().manual_seed(0)
    before = torch.randn(20, 256, generator=g)
    after = before + torch.randn(20, 256, generator=g) * (torch.arange(20)[:, None] / 10)
    return ks_test(before, after)


def test_alpha_takes_the_significant_rows_in_ascending_order(result):
    ticket = ks_ticket(result, alpha=0.05)
    assert ticket.token_ids.tolist() == np.flatnonzero(result.pvalue < 0.05).tolist()
    assert ticket.token_ids.dtype == np.int64
    assert 0 < len(ticket) < 20
    assert (ticket.pvalue < 0.05).all()
    assert (ticket.statistic == result.statistic[ticket.token_ids]).all()


def test_top_k_takes_the_largest_statistics_whatever_their_p(result):
    ticket = ks_ticket(result, alpha=None, top_k=15)
    rest = np.setdiff1d(np.arange(20), ticket.token_ids)
    assert len(ticket) == 15
    assert ticket.statistic.min() >= result.statistic[rest].max()
    assert ticket.pvalue.max() > 0.05


def test_both_take_at_most_top_k_of_the_significant_rows(result):
    significant = ks_ticket(result, alpha=0.05)
    assert len(ks_ticket(result, alpha=0.05, top_k=3)) == 3
    assert ks_ticket(result, alpha=0.05, top_k=20).token_ids.tolist() == significant.token_ids.tolist()


def test_more_rows_than_the_cap_are_cut_with_a_warning(result):
    with pytest.warns(UserWarning, match=r"rows have p < 0.05; the ticket keeps the 2 of largest D"):
        ticket = ks_ticket(result, alpha=0.05, cap=2)
    assert ticket.token_ids.tolist() == sorted(np.argsort(-result.statistic)[:2].tolist())


def test_an_empty_ticket_is_explained():
    before = torch.randn(5, 576, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TicketError, match=r"D must be at least 0\.08.*about \d\.\d\d times.*largest D is 0\.00"):
        ks_ticket(ks_test(before, before * 1.001))
    with pytest.raises(TicketError, match="no row's distribution changed at all"):
        ks_ticket(ks_test(before, before))
    with pytest.raises(TicketError, match="with 2 values a row, no D can have p < 0.05"):
        ks_ticket(ks_test(before[:, :2], before[:, :2] + 9))


def test_rows_that_did_not_move_are_never_in_a_ticket():
    result = KSResult(np.array([0.0, 0.5, 0.0]), np.array([1.0, 0.01, 1.0]), 10)
    assert ks_ticket(result, alpha=1.0).token_ids.tolist() == [1]
    assert ks_ticket(result, alpha=None, top_k=3).token_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": None}, "alpha, top_k or both"),
        ({"alpha": 0.0}, "above 0 and at most 1"),
        ({"alpha": 1.5}, "above 0 and at most 1"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(result, settings, message):
    with pytest.raises(TicketError, match=message):
        ks_ticket(result, **settings)


def test_controls():
    counts = np.array([5, 0, 9, 1, 9, 0, 2])
    assert frequency_ticket(counts, 3).token_ids.tolist() == [0, 2, 4]
    drawn = random_ticket(counts, 3, seed=1)
    assert drawn.token_ids.tolist() == random_ticket(counts, 3, seed=1).token_ids.tolist()
    assert {tuple(random_ticket(counts, 3, seed=s).token_ids) for s in range(20)} > {tuple(drawn.token_ids)}
    assert all(counts[random_ticket(counts, 4, seed=s).token_ids].all() for s in range(20))
    ids, distance = np.array([10, 11, 13, 16]), np.array([1.0, 5, 0, 4])
    assert l2_ticket(ids, distance, 2).token_ids.tolist() == [11, 16]
    for too_many in (lambda: frequency_ticket(counts, 6), lambda: random_ticket(counts, 6, 0)):
        with pytest.raises(TicketError, match="read only 5 different tokens"):
            too_many()
    with pytest.raises(TicketError, match="only 3 changed"):
        l2_ticket(ids, distance, 4)


def test_detectable_change_is_the_shift_of_a_normal_row():
    for r in (0.2, 1.0, 5.0):
        x = np.linspace(-30, 30, 600_001)
        shift = np.abs(norm.cdf(x) - norm.cdf(x / np.sqrt(1 + r * r))).max()
        assert detectable_change(shift) == pytest.approx(r, rel=1e-3)
    assert detectable_change(0.6) == float("inf")
