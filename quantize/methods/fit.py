"""Scales by search: of a fixed set of ranges the least-squares fit that leaves the least error.

Errors may count differently: by the importance of their input, and more in large weights, as in
ggml's kernels. Fewer of those are clipped then, which is what error feedback cannot make up for.

Groups of weights lie side by side in tiles of LANES, one sum to a lane: that is what lets the loops
vectorize while the order of every sum, and so every byte, is the same on any CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..grid import Float32

LANES = 64
Vector = npt.NDArray[Any]  # 1-D, one value per lane or per group

_LEAST = np.float32(1e-5)  # importance, of the largest beside it: sums are float32 too
_LARGE = np.float32(0.3)  # of the mean square: about where a weight begins to be large


def costs(table: Float32, importance: Float32 | None, span: int) -> Float32:
    """What an error counts in each weight of `table` (groups, size), rows after each other.

    Args:
        importance: float32 (columns,), the mean of x^2 of each input; None: all count alike, and
            no costs are returned.
        span: weights, whole groups, of which the mean square tells what is large.
    """
    if importance is None or not importance.any():
        return np.empty((0, table.shape[1]), np.float32)
    inputs = importance.reshape(-1, table.shape[1])
    peak = inputs.max(1, keepdims=True)
    # Inputs that never mattered decide where nothing else does.
    relative = np.maximum(inputs / np.where(peak > 0, peak, np.float32(1)), _LEAST)
    found: Float32 = _costs(table.reshape(-1, span), relative.reshape(-1)).reshape(table.shape)
    return found


@compiled
def _costs(table: Float32, inputs: Vector) -> Float32:
    found = np.empty_like(table)
    spans, span = table.shape
    for i in range(spans):
        square = np.float32(0)
        for value in table[i]:
            square += value * value
        floor = _LARGE * square / np.float32(span)
        first = i * span % inputs.size
        for j in range(span):
            found[i, j] = inputs[first + j] * np.sqrt(floor + table[i, j] * table[i, j])
    return found


@compiled
def load(
    table: Float32, costs: Float32, first: int, count: int, tile: Float32, cost: Float32
) -> None:
    """Groups first .. first + count - 1 into the lanes of `tile`, their costs into `cost`.

    Both are (size, LANES); `cost` stays as it is where there are no costs.
    """
    for lane in range(count):
        for j in range(tile.shape[0]):
            tile[j, lane] = table[first + lane, j]
            if costs.size:
                cost[j, lane] = costs[first + lane, j]


@compiled
def with_minimum(
    table: Float32, costs: Float32, top: np.float32, ranges: Float32, scale: Vector, low: Vector
) -> None:
    """Scales and minimums (not above 0) of groups (groups, size), neither rounded."""
    groups, size = table.shape
    tile = np.zeros((size, LANES), np.float32)
    cost = np.ones((size, LANES), np.float32)
    lowest = np.empty(LANES, np.float32)
    highest = np.empty(LANES, np.float32)
    w = np.empty(LANES, np.float32)
    wx = np.empty(LANES, np.float32)
    wq = np.empty(LANES, np.float32)
    wqq = np.empty(LANES, np.float32)
    wqx = np.empty(LANES, np.float32)
    start = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    best_scale = np.empty(LANES, np.float32)
    best_low = np.empty(LANES, np.float32)
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        load(table, costs, first, count, tile, cost)
        for lane in range(LANES):
            lowest[lane] = highest[lane] = w[lane] = wx[lane] = 0
            best[lane] = -1
        for j in range(size):
            for lane in range(LANES):
                value, weight = tile[j, lane], cost[j, lane]
                lowest[lane] = value if value < lowest[lane] else lowest[lane]
                highest[lane] = value if value > highest[lane] else highest[lane]
                w[lane] += weight
                wx[lane] += weight * value
        for lane in range(LANES):  # where no range leaves two different codes
            best_scale[lane] = (highest[lane] - lowest[lane]) / top
            best_low[lane] = lowest[lane]
        for trial in range(ranges.size + 2):
            for lane in range(LANES):
                if trial < ranges.size:
                    span = highest[lane] - lowest[lane]
                    start[lane] = lowest[lane]
                    inverse[lane] = ranges[trial] / span if span > 0 else np.float32(0)
                else:  # from the best fit so far
                    start[lane] = best_low[lane]
                    found = best_scale[lane]
                    inverse[lane] = np.float32(1) / found if found > 0 else np.float32(0)
                wq[lane] = wqq[lane] = wqx[lane] = 0
            for j in range(size):
                for lane in range(LANES):
                    value, weight = tile[j, lane], cost[j, lane]
                    code = np.rint((value - start[lane]) * inverse[lane])
                    code = np.float32(0) if code < 0 else code
                    code = top if code > top else code
                    weighed = weight * code
                    wq[lane] += weighed
                    wqq[lane] += weighed * code
                    wqx[lane] += weighed * value
            for lane in range(LANES):
                # The gain is what a fit takes from the squared error of all zeros.
                determinant = w[lane] * wqq[lane] - wq[lane] * wq[lane]
                slope = (w[lane] * wqx[lane] - wx[lane] * wq[lane]) / determinant
                offset = (wqq[lane] * wx[lane] - wq[lane] * wqx[lane]) / determinant
                through_zero = not (offset <= 0)
                slope = wqx[lane] / wqq[lane] if through_zero else slope
                offset = np.float32(0) if through_zero else offset
                gain = slope * wqx[lane] + offset * wx[lane]
                if gain > best[lane] and slope > 0:
                    best[lane] = gain
                    best_scale[lane] = slope
                    best_low[lane] = offset
        for lane in range(count):
            scale[first + lane] = best_scale[lane]
            low[first + lane] = best_low[lane]


@compiled
def alone(
    table: Float32,
    costs: Float32,
    ends: tuple[np.float32, np.float32],
    ranges: Float32,
    signed: bool,
    scale: Vector,
) -> None:
    """Scales of groups (groups, size), not rounded; not below 0 unless `signed`."""
    groups, size = table.shape
    tile = np.zeros((size, LANES), np.float32)
    cost = np.ones((size, LANES), np.float32)
    peak = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    wqq = np.empty(LANES, np.float32)
    wqx = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    best_scale = np.empty(LANES, np.float32)
    lowest, highest = ends
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        load(table, costs, first, count, tile, cost)
        for lane in range(LANES):
            peak[lane] = best[lane] = best_scale[lane] = 0
        for j in range(size):
            for lane in range(LANES):
                value = tile[j, lane]
                peak[lane] = value if abs(value) > abs(peak[lane]) else peak[lane]
        for trial in range(ranges.size + 2):
            for lane in range(LANES):
                if trial < ranges.size:
                    reach = -peak[lane] if signed else abs(peak[lane])
                    inverse[lane] = ranges[trial] / reach if reach != 0 else np.float32(0)
                else:
                    found = best_scale[lane]
                    inverse[lane] = np.float32(1) / found if found != 0 else np.float32(0)
                wqq[lane] = wqx[lane] = 0
            for j in range(size):
                for lane in range(LANES):
                    value = tile[j, lane]
                    code = np.rint(value * inverse[lane])
                    code = lowest if code < lowest else code
                    code = highest if code > highest else code
                    weighed = cost[j, lane] * code
                    wqq[lane] += weighed * code
                    wqx[lane] += weighed * value
            for lane in range(LANES):
                gain = wqx[lane] * wqx[lane] / wqq[lane]
                if gain > best[lane]:
                    best[lane] = gain
                    best_scale[lane] = wqx[lane] / wqq[lane]
        for lane in range(count):
            scale[first + lane] = best_scale[lane]
