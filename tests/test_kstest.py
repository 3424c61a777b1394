"""The KS test over tables against scipy's test of one row at a time."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import ks_2samp

from ksl_patch import ks_test
from ksl_patch.kstest import _steps_torch, critical_statistic, pvalue_table

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
finite = st.floats(-100, 100, width=16)


def exact_pvalue(h: int, d: int) -> Fraction:
    """Hodges' sum in rational arithmetic."""
    if h == 0:
        return Fraction(1)
    terms = ((-1) ** (j + 1) * Fraction(math.comb(2 * d, d + j * h), math.comb(2 * d, d)) for j in range(1, d // h + 1))
    return 2 * sum(terms)


def check_against_scipy(before: torch.Tensor, after: torch.Tensor, result) -> None:
    d = before.shape[1]
    for row, (x, y) in enumerate(zip(before.double().numpy(), after.double().numpy(), strict=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                expected = ks_2samp(x, y, method="exact")
                statistic, pvalue = expected.statistic, expected.pvalue
            except RuntimeWarning:
                # scipy gives up where rounding takes its own p above 1, and approximates instead.
                statistic = ks_2samp(x, y, method="asymp").statistic
                pvalue = float(exact_pvalue(round(statistic * d), d))
                statistic = round(statistic * d) / d
        assert result.statistic[row] == statistic
        assert result.pvalue[row] == pytest.approx(pvalue, rel=1e-10, abs=0)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data(), d=st.integers(1, 70), rows=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
def test_equals_scipy_on_any_values_with_ties(data, d, rows, dtype):
    # Few different values make many ties.
    elements = data.draw(st.sampled_from([finite, st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0])]))
    before, after = (
        torch.from_numpy(data.draw(hnp.arrays(np.float64, (rows, d), elements=elements))).to(dtype) for _ in range(2)
    )
    result = ks_test(before, after, chunk_rows=data.draw(st.sampled_from([None, 1, 3])))
    assert result.statistic.dtype == result.pvalue.dtype == np.float64
    check_against_scipy(before, after, result)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 576, 4096, 10001, 16384])
def test_equals_scipy_at_real_sizes(d, dtype):
    g = torch.Generator().manual_seed(d)
    before = torch.randn(7, d, generator=g, dtype=torch.float64)
    noise = torch.randn(7, d, generator=g, dtype=torch.float64)
    after = before + noise * torch.tensor([0, 1e-3, 0.1, 0.5, 1.0, 3.0, 0.0])[:, None]
    after[6] += 1000  # D = 1: the smallest p there is
    before, after = before.to(dtype), after.to(dtype)
    check_against_scipy(before, after, ks_test(before, after))


@pytest.mark.parametrize("d", [1, 2, 5, 16, 61])
def test_every_pvalue_equals_the_rational_sum(d):
    table = pvalue_table(d)
    assert table == pytest.approx([float(exact_pvalue(h, d)) for h in range(d + 1)], rel=1e-12)


def test_identical_permuted_and_constant_rows():
    row = torch.randn(64)
    before = torch.stack([row, row, torch.full((64,), 3.0), torch.full((64,), 3.0), torch.zeros(64)])
    after = torch.stack([row, row.flip(0), torch.full((64,), 3.0), torch.full((64,), 4.0), -torch.zeros(64)])
    result = ks_test(before, after)
    assert result.statistic.tolist() == [0, 0, 0, 1, 0]
    assert result.pvalue[[0, 1, 2, 4]].tolist() == [1, 1, 1, 1]
    assert 0 < result.pvalue[3] < 1e-30


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_the_path_for_other_devices_agrees(dtype):
    g = torch.Generator().manual_seed(1)
    before = torch.randn(50, 33, generator=g).to(dtype)
    after = (before.float() + 0.5 * torch.randn(50, 33, generator=g) * (torch.arange(50)[:, None] % 3)).to(dtype)
    h = _steps_torch(before, after, torch.bfloat16 if dtype.itemsize == 1 else dtype, torch.device("cpu"), 7)
    assert (h / 33).tolist() == ks_test(before, after).statistic.tolist()


def test_tables_of_two_dtypes_and_numpy():
    before = torch.randn(3, 40).bfloat16()
    after = before.float() + 0.3
    expected = ks_test(before.float(), after)
    assert ks_test(before, after).statistic.tolist() == expected.statistic.tolist()
    assert ks_test(before.float().numpy(), after.numpy()).pvalue.tolist() == expected.pvalue.tolist()
    # A transposed view is not contiguous.
    assert ks_test(before.t().contiguous().t(), after).statistic.tolist() == expected.statistic.tolist()


@pytest.mark.parametrize("steps", ["cpu", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_is_named(dtype, value, steps):
    before, after = torch.zeros(300, 5, dtype=dtype), torch.zeros(300, 5, dtype=dtype)
    after[271, 3] = value
    before[290, 0] = value

    def run(x, y):
        if steps == "cpu":
            ks_test(x, y, chunk_rows=16)
        else:
            _steps_torch(x, y, dtype, torch.device("cpu"), 16)

    with pytest.raises(ValueError, match="row 271 of after has a NaN or an infinity"):
        run(before, after)
    with pytest.raises(ValueError, match="row 271 of before"):
        run(after, torch.zeros_like(after))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"differ in shape: before is \[2, 3\], after is \[3, 2\]"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "empty"),
        (torch.zeros(3, 0), torch.zeros(3, 0), "empty"),
        (torch.zeros(3), torch.zeros(3), r"table \[V, d\]"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), "floating-point"),
        (np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3)), "floating-point"),
        ([[1.0]], torch.zeros(1, 1), "torch tensor or a numpy array"),
    ],
)
def test_wrong_tables_are_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        ks_test(before, after)


def test_critical_statistic_is_the_smallest_significant_one():
    for d, alpha in [(64, 0.05), (576, 0.05), (576, 1e-6)]:
        h = round(critical_statistic(d, alpha) * d)
        table = pvalue_table(d)
        assert table[h] < alpha <= table[h - 1]
    assert critical_statistic(2, 0.05) is None
    # The usual approximation 1.358 * sqrt(2 / d).
    assert critical_statistic(4096, 0.05) == pytest.approx(1.358 * math.sqrt(2 / 4096), rel=0.02)
