"""Two-sample Kolmogorov-Smirnov test between the rows of two tables, exact, for all rows at once.

Which rows make a ticket is decided in `ticket.py`; here are only the statistic and its p-value.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit

_Table = torch.Tensor | np.ndarray


@dataclass(frozen=True)
class KSResult:
    """The test's outcome for every row of a [V, d] table.

    statistic: float64 [V], D = sup |F_before - F_after|, a multiple of 1/d.
    pvalue: float64 [V], exact and two-sided for independent samples. Values before and after a training are paired, so
    it ranks rows and is no calibrated probability: the less a row changed, the more it is too large.
    hidden_size: d, the number of values in a row (the size of both samples).
    """

    statistic: np.ndarray
    pvalue: np.ndarray
    hidden_size: int


def ks_test(
    before: _Table, after: _Table, *, chunk_rows: int | None = None, device: torch.device | str | None = None
) -> KSResult:
    """Test for each row whether the distribution of its values has shifted.

    before, after: [V, d], any float dtype, torch tensors or numpy arrays; two dtypes are compared in
        the one that holds both exactly.
    chunk_rows: rows in one piece of work (memory is proportional to it); chosen to fit caches by default.
    device: where to compute; by default where `before` is. CPU work uses every core.

    D equals `scipy.stats.ks_2samp(b, a, method="exact").statistic` bit for bit and p agrees with its
    p-value to 1e-10 relative, ties included (Hodges, "The significance probability of the Smirnov
    two-sample test", 1958, for equal sample sizes).

    Raises ValueError for tables that are empty, of different shapes or not floating point, and for a
    row with NaN or infinity, which it names.
    """
    before, after = _tensor(before, "before"), _tensor(after, "after")
    if before.shape != after.shape:
        raise ValueError(f"the tables differ in shape: before is {list(before.shape)}, after is {list(after.shape)}.")
    if before.numel() == 0:
        raise ValueError(f"the tables are empty: their shape is {list(before.shape)}.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}.")
    target = before.device if device is None else torch.device(device)
    steps = _steps_cpu if target.type == "cpu" else _steps_torch
    h = steps(before, after, _common_dtype(before.dtype, after.dtype), target, chunk_rows)
    d = before.shape[1]
    return KSResult(statistic=h / d, pvalue=pvalue_table(d)[h], hidden_size=d)


@lru_cache(maxsize=16)
def pvalue_table(d: int) -> np.ndarray:
    """Exact two-sided p of every D = h/d, h = 0..d, for two samples of size d: float64 [d + 1].

    p(h) = 2 * sum_{j>=1} (-1)^(j+1) C(2d, d + jh) / C(2d, d)    (Hodges 1958; scipy computes the same).
    """
    ratio = np.empty(d + 1)  # ratio[m] = C(2d, d + m) / C(2d, d)
    ratio[0] = value = 1.0
    for m in range(d):
        value = (d - m) * value / (d + m + 1)
        ratio[m + 1] = value
    p = np.ones(d + 1)
    for h in range(1, d + 1):
        terms = ratio[h::h]
        p[h] = 2.0 * (terms[0::2].sum() - terms[1::2].sum())
    p.clip(0.0, 1.0, out=p).setflags(write=False)
    return p


def critical_statistic(d: int, alpha: float) -> float | None:
    """The smallest D with p < alpha for rows of d values; None when even D = 1 has p >= alpha."""
    significant = np.flatnonzero(pvalue_table(d) < alpha)
    return float(significant[0]) / d if significant.size else None


def _tensor(table: _Table, name: str) -> torch.Tensor:
    if isinstance(table, np.ndarray):
        if table.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{name} must be a table of floating-point numbers, not {table.dtype}.")
        table = torch.from_numpy(np.require(table, requirements=["C", "W"]))
    if not isinstance(table, torch.Tensor):
        raise ValueError(f"{name} must be a torch tensor or a numpy array, not {type(table).__name__}.")
    if not table.is_floating_point():
        raise ValueError(f"{name} must be a table of floating-point numbers, not {table.dtype}.")
    if table.ndim != 2:
        raise ValueError(f"{name} must be a table [V, d], but it has the shape {list(table.shape)}.")
    return table.detach()


def _common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    # float8 has no promotion rules in torch; all its values are exact in bfloat16.
    a, b = (torch.bfloat16 if x.itemsize == 1 else x for x in (a, b))
    return torch.promote_types(a, b)


def _not_finite(row: int, name: str) -> ValueError:
    return ValueError(f"row {row} of {name} has a NaN or an infinity; the test needs finite values.")


def _steps_cpu(
    before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, device: torch.device, chunk_rows: int | None
) -> np.ndarray:
    """h = D * d of each row, int64 [V]: sort both rows, then one linear merge."""
    V, d = before.shape
    rows = chunk_rows or max(1, (1 << 19) // d)  # 2 MB of float32: enough work to hide what starting it costs
    h = np.zeros(V, dtype=np.int64)

    bits, exponent, unit = _BITS[dtype]
    # Eight bytes at a time where a row is a multiple of that, with the masks once for each value in them.
    lanes = 8 // bits.itemsize if d * bits.itemsize % 8 == 0 else 1
    word = np.dtype(f"u{lanes * bits.itemsize}")
    repeat = sum(1 << (8 * bits.itemsize * lane) for lane in range(lanes))
    masks = [np.uint64(mask * repeat) for mask in (exponent, unit, exponent + unit)]

    def work(start: int) -> None:
        x = before[start : start + rows].to(device, dtype).contiguous()
        y = after[start : start + rows].to(device, dtype).contiguous()
        bx, by = x.view(bits).numpy(), y.view(bits).numpy()
        changed = np.empty(len(bx), dtype=np.bool_)
        bad = _scan(bx.view(word), by.view(word), *masks, changed)
        if bad >= 0:
            raise _not_finite(start + bad // 2, "after" if bad % 2 else "before")
        moved = np.flatnonzero(changed)
        if not moved.size:
            return
        if bits is torch.int16:
            kx, ky = bx[moved], by[moved]
            _order_keys(kx)
            _order_keys(ky)
        else:
            kx, ky = x.numpy()[moved], y.numpy()[moved]
        kx.sort(axis=1)
        ky.sort(axis=1)
        h[start + moved] = _merge(kx, ky)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        list(pool.map(work, range(0, V, rows)))  # raises what a piece of work raised
    return h


def _compiled(function: Any) -> Any:
    """numba's compiled function, kept on disk where there is a place for it: not in every container."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


# The integer of the same width, its exponent bits (all set means NaN or infinity), and the lowest of them.
_BITS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.bfloat16: (torch.int16, 0x7F80, 0x80),
    torch.float16: (torch.int16, 0x7C00, 0x400),
    torch.float32: (torch.int32, 0x7F80_0000, 0x80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 0x10_0000_0000_0000),
}


@_compiled
def _scan(x, y, exponent, unit, sign, changed):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Mark the rows whose bits differ; return 2 * row (+ 1 for y) of the first non-finite row, or -1.

    Adding one unit to an exponent carries into the sign's place when all of its bits are set, and only then.
    """
    for r in range(x.shape[0]):
        differ = bad_x = bad_y = np.uint64(0)
        for c in range(x.shape[1]):
            u = np.uint64(x[r, c])
            v = np.uint64(y[r, c])
            differ |= u ^ v
            bad_x |= (u & exponent) + unit
            bad_y |= (v & exponent) + unit
        if bad_x & sign:
            return 2 * r
        if bad_y & sign:
            return 2 * r + 1
        changed[r] = differ != 0
    return -1


@_compiled
def _order_keys(bits):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """In place: 16-bit float patterns to int16 of the same order, -0.0 and 0.0 to the same key."""
    for r in range(bits.shape[0]):
        for c in range(bits.shape[1]):
            value = bits[r, c]
            if value < 0:
                bits[r, c] = -(value & np.int16(0x7FFF))


@_compiled
def _merge(x, y):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """max |i - j| while walking two sorted rows: D * d, [R].

    Inside a group of equal values the difference i - j runs from its value before the group to its value
    after it without leaving that interval, so the steps inside the group never exceed the true maximum
    and ties need no case of their own.
    """
    R, d = x.shape
    h = np.empty(R, dtype=np.int64)
    for r in range(R):
        i = j = most = 0
        while i < d and j < d:
            u = x[r, i]
            v = y[r, j]
            i += u <= v
            j += v <= u
            most = max(most, abs(i - j))
        h[r] = most
    return h


def _steps_torch(
    before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, device: torch.device, chunk_rows: int | None
) -> np.ndarray:
    """The same in tensor code for any device: sort, then count with searchsorted."""
    V, d = before.shape
    rows = chunk_rows or max(1, (1 << 24) // d)
    h = torch.zeros(V, dtype=torch.int64)
    # searchsorted lacks the 16-bit dtypes on some devices; float32 holds them exactly.
    dtype = torch.float32 if dtype.itemsize == 2 else dtype
    for start in range(0, V, rows):
        x = before[start : start + rows].to(device, dtype)
        y = after[start : start + rows].to(device, dtype)
        _check_finite(x, start, "before")
        _check_finite(y, start, "after")
        moved = (x != y).any(dim=1).nonzero().squeeze(1)
        if not moved.numel():
            continue
        x, y = x[moved].sort(dim=1).values, y[moved].sort(dim=1).values
        points = torch.cat([x, y], dim=1)  # [R, 2d]: the steps of both distribution functions
        steps = torch.searchsorted(x, points, right=True) - torch.searchsorted(y, points, right=True)
        h[start + moved.cpu()] = steps.abs().amax(dim=1).cpu()
    return h.numpy()


def _check_finite(x: torch.Tensor, start: int, name: str) -> None:
    bad = (~x.isfinite()).any(dim=1).nonzero()
    if bad.numel():
        raise _not_finite(start + int(bad[0, 0]), name)
