"""Round to nearest: every weight becomes the nearest code, under the scale with the least error.

A scale is rounded to 8 significant bits before codes are chosen. The search tries a fixed set of
divisors of each group's largest magnitude, fits the scale by least squares to the codes that each
of them gives, and keeps the fit that leaves the least squared error.

Groups lie side by side in tiles of LANES, one sum to a lane: that is what lets the loops vectorize
while the order of every sum, and so every byte, is the same on any CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..grid import Float32, Grid, Int8, round_scale
from ..tensor import QuantizedTensor
from . import asymmetric, fit
from .fit import LANES, Vector

# By bits: divisors of a largest magnitude that is negative, and of one that is positive. They run
# from one code inside the range to where a third of it would be clipped; at 8 bits clipping never
# pays, so only the fit varies, and at 2 bits much may be clipped. test_rtn.py holds them against
# every representable scale.
_DIVISORS = {
    2: np.stack([np.linspace(0.6, 4, 24)] * 2).astype(np.float32),
    3: np.stack([np.linspace(2.8, 6, 20), np.linspace(2, 5.2, 20)]).astype(np.float32),
    4: np.stack([np.linspace(7, 11, 12), np.linspace(6, 10, 12)]).astype(np.float32),
    8: np.stack([np.linspace(121, 130, 8)] * 2).astype(np.float32),
}
# The same where errors are weighed, for either sign.
_RANGES = {
    2: np.linspace(0.6, 4, 24, dtype=np.float32),
    3: np.linspace(2, 6, 24, dtype=np.float32),
    4: np.linspace(6, 11, 18, dtype=np.float32),
    8: np.linspace(120, 130, 10, dtype=np.float32),
}
_TINY = np.float32(2.0**-100)  # a group below it is not searched: its reciprocal may overflow

UInt32 = npt.NDArray[np.uint32]


def solve(
    weight: Float32, grid: Grid, search: bool = True, importance: Float32 | None = None
) -> QuantizedTensor:
    """Quantize a finite matrix (rows, columns), float32, by rounding to nearest.

    With `search` the scale is that of the least squared error in its group (each error as
    `fit.costs` counts it if `importance` is given); without, the one that puts the largest
    magnitude on the outermost code. Rows are independent, so blocks of rows give the codes of the
    whole matrix, and may be solved in several threads.
    """
    if grid.asymmetric:
        return asymmetric.solve(weight, grid, search, importance)
    scale = find_scale(weight, grid, search, importance)
    return QuantizedTensor(grid, encode(weight, scale, grid), scale)


def find_scale(
    weight: Float32, grid: Grid, search: bool = True, importance: Float32 | None = None
) -> Float32:
    """The rounded scale of every group of `weight` (rows, columns): float32 (rows, groups)."""
    assert grid.levels is None, "codebook.py solves these"
    rows, columns = weight.shape
    groups = grid.groups(columns)
    table = np.ascontiguousarray(weight, np.float32).reshape(rows * groups, columns // groups)
    if importance is not None:
        costs = fit.costs(table, importance, table.shape[1])
        scale = np.empty(rows * groups, np.float32)
        fit.alone(table, costs, _limits(grid), _RANGES[grid.bits], grid.signed_scale, scale)
        lost = scale == 0  # squares of what is far from 1 are beyond float32
        scale[lost] = _searched(table[lost], grid)
    elif search:
        scale = _searched(table, grid)
    else:
        scale = _outermost_scale(table, grid)
    return round_scale(scale.reshape(rows, groups))


def _searched(table: Float32, grid: Grid) -> Vector:
    scale = np.empty(len(table), np.float32)
    _find_scales(table, _DIVISORS[grid.bits], *_limits(grid), grid.signed_scale, scale)
    return scale


def _outermost_scale(table: Float32, grid: Grid) -> Vector:
    """Scales that put the largest magnitude of each group on the outermost code of its side."""
    keys = np.empty(len(table), np.uint32)
    _find_largest(table.view(np.uint32), keys)
    peak = (keys >> np.uint32(1)).view(np.float32)
    low, high = _limits(grid)
    positive = 1 / low if grid.signed_scale else 1 / high
    scale: Vector = peak * np.where(keys & np.uint32(1), -1 / low, positive)
    return scale


def encode(weight: Float32, scale: Float32, grid: Grid) -> Int8:
    """The nearest code of every weight under `scale` (rows, groups): int8 (rows, columns)."""
    codes = np.empty(weight.shape, np.int8)
    size = weight.shape[1] // scale.shape[1]
    table = np.ascontiguousarray(weight, np.float32).reshape(-1, size)
    low, high = _limits(grid)
    _encode(table, np.ascontiguousarray(scale).reshape(-1), low, high, codes.reshape(-1, size))
    return codes


def _limits(grid: Grid) -> tuple[np.float32, np.float32]:
    return np.float32(grid.low), np.float32(grid.high)


@compiled
def _find_largest(bits: UInt32, keys: UInt32) -> None:
    """The largest magnitude of each group of float32 `bits` (groups, size), its sign as last bit.

    Magnitudes are ordered as their bits are, and a maximum of integers vectorizes. Of equal ones
    the negative one wins.
    """
    for group in range(bits.shape[0]):
        largest = np.uint32(0)
        for j in range(bits.shape[1]):
            rotated = np.uint32((bits[group, j] << 1) | (bits[group, j] >> 31))
            largest = max(largest, rotated)
        keys[group] = largest


@compiled
def _find_scales(
    table: Float32,
    divisors: Float32,
    low: np.float32,
    high: np.float32,
    signed: bool,
    scale: Vector,
) -> None:
    """Scales, not rounded, of the groups of `table` (groups, size); an all-zero one gets 0."""
    groups, size = table.shape
    tile = np.zeros((size, LANES), np.float32)
    peak = np.empty(LANES, np.float32)  # the largest magnitude
    sign = np.empty(LANES, np.float32)  # of the scale
    side = np.empty(LANES, np.int64)  # row of `divisors`
    ratio = np.empty(LANES, np.float32)  # scale / peak
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        for lane in range(count):
            for j in range(size):
                tile[j, lane] = table[first + lane, j]
        _find_peaks(tile, signed, peak, sign, side)
        for lane in range(LANES):
            ratio[lane] = sign[lane] / divisors[side[lane], 0]
        _fit(tile, peak, sign, side, divisors, low, high, ratio)
        for lane in range(count):
            scale[first + lane] = peak[lane] * ratio[lane]


@compiled
def _find_peaks(tile: Float32, signed: bool, peak: Vector, sign: Vector, side: Vector) -> None:
    """A signed scale always puts the largest magnitude on the low side, which reaches further."""
    lowest = np.zeros(LANES, np.float32)
    highest = np.zeros(LANES, np.float32)
    for j in range(tile.shape[0]):
        for lane in range(LANES):
            value = tile[j, lane]
            lowest[lane] = value if value < lowest[lane] else lowest[lane]
            highest[lane] = value if value > highest[lane] else highest[lane]
    for lane in range(LANES):
        negative = -lowest[lane] >= highest[lane]
        peak[lane] = -lowest[lane] if negative else highest[lane]
        sign[lane] = np.float32(1) if negative or not signed else np.float32(-1)
        side[lane] = 0 if negative or signed else 1


@compiled
def _fit(
    tile: Float32,
    peak: Vector,
    sign: Vector,
    side: Vector,
    divisors: Float32,
    low: np.float32,
    high: np.float32,
    ratio: Vector,
) -> None:
    """Improve `ratio`. With codes q and the scale fitted to them, w.q/q.q, the squared error is
    w.w - (w.q)^2/q.q, so the largest gain (w.q)^2/q.q wins. Overwrites `tile` by w / peak.
    """
    divisor = np.empty(LANES, np.float32)
    dot = np.empty(LANES, np.float32)
    norm = np.empty(LANES, np.float32)
    best = np.zeros(LANES, np.float32)
    for lane in range(LANES):
        divisor[lane] = sign[lane] / peak[lane] if peak[lane] > _TINY else np.float32(0)
    for j in range(tile.shape[0]):
        for lane in range(LANES):
            tile[j, lane] *= divisor[lane]
    for candidate in range(divisors.shape[1]):
        for lane in range(LANES):
            divisor[lane] = divisors[side[lane], candidate]
            dot[lane] = 0
            norm[lane] = 0
        for j in range(tile.shape[0]):
            for lane in range(LANES):
                value = tile[j, lane]
                code = np.rint(value * divisor[lane])
                code = low if code < low else code
                code = high if code > high else code
                dot[lane] += value * code
                norm[lane] += code * code
        for lane in range(LANES):
            gain = dot[lane] * dot[lane] / norm[lane]  # NaN, and no better, where all codes are 0
            if gain > best[lane]:
                best[lane] = gain
                ratio[lane] = sign[lane] * (dot[lane] / norm[lane])


@compiled
def _encode(table: Float32, scale: Vector, low: np.float32, high: np.float32, codes: Int8) -> None:
    groups, size = table.shape
    for group in range(groups):
        step = scale[group]
        for j in range(size):
            code = np.rint(table[group, j] / step)
            code = low if code < low else code
            code = high if code > high else code
            codes[group, j] = np.int32(code)
