"""Round to nearest in ggml's super-blocks: scales by search.

A super-block of 256 weights has sub-blocks of 16 or 32 with a scale of few bits each, of the scale
that all share; Q2_K, Q4_K and Q5_K also have minimums (block layouts: ggml's `ggml-common.h`). Each
sub-block is fitted by least squares to the codes of a fixed set of ranges; then the shared scale is
chosen, and of each sub-block's nearest numbers of few bits those that leave the least error.

Sub-blocks lie side by side in tiles of LANES, as in rtn.py and for its reasons.
"""

from __future__ import annotations

import numpy as np

from ..blocks import BlockGrid, BlockTensor
from ..blocks import solve as by_ggml
from ..codes import CODES
from ..compiled import compiled
from ..ggml import BLOCKS, Type, UInt8
from ..grid import Float32
from ..recode import replace_codes
from ..subscales import LAYOUTS, SUPER, Int16
from .rtn import LANES, Vector

_LEAST = np.float32(1e-5)
# How many steps the weights of a sub-block may span; all are tried.
_RANGES = {
    Type.Q2_K: np.linspace(1.8, 4.2, 16),
    Type.Q3_K: np.linspace(2.6, 5.0, 10),
    Type.Q4_K: np.linspace(13.2, 16.2, 16),
    Type.Q5_K: np.linspace(29.2, 32.2, 12),
    Type.Q6_K: np.linspace(30, 34, 12),
}
# What may be added to the small scale and the small minimum of a sub-block.
_MOVES = np.array(
    [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)], np.int16
)
_LARGE = np.float32(0.3)  # of the mean square: about where a weight begins to be large


def round_blocks(
    weight: Float32, grid: BlockGrid, importance: Float32 | None = None
) -> BlockTensor:
    """By `solve` where it knows the type, by ggml's kernel elsewhere."""
    known = grid.type in LAYOUTS
    return (solve if known else by_ggml)(weight, grid, importance)


def solve(weight: Float32, grid: BlockGrid, importance: Float32 | None = None) -> BlockTensor:
    """Quantize a finite matrix (rows, columns), float32; rows are independent.

    Args:
        grid: one of LAYOUTS.
        importance: float32 (columns,), the mean of x^2 of each input. Errors then count by it, and
            more in large weights, as in ggml's kernels: fewer of them are clipped, which is what
            error feedback cannot make up for. None: all errors count alike.
    """
    layout, size = LAYOUTS[grid.type], CODES[grid.type].group
    rows, columns = weight.shape
    table = np.ascontiguousarray(weight, np.float32).reshape(-1, size)
    ranges = _RANGES[grid.type].astype(np.float32)
    costs = np.ones_like(table)
    if importance is not None and importance.any():
        _weigh(table.reshape(-1, SUPER), _relative(importance), costs.reshape(-1, SUPER))
    first = np.float32(layout.first)
    ends = first, first + np.float32(len(CODES[grid.type].levels) - 1)
    scale, low = np.empty(len(table), np.float32), np.zeros(len(table), np.float32)
    if layout.signed:
        _fit_signed(table, costs, ends, ranges, scale)
    else:
        _fit_with_minimum(table, costs, ends[1], ranges, scale, low)
    per = SUPER // size
    small, shared = _shared(scale.reshape(-1, per), layout.limits)
    small_low, shared_low = _shared(-low.reshape(-1, per), layout.limits)
    moves = _MOVES[:3] if layout.signed else _MOVES
    flat = small.reshape(-1), small_low.reshape(-1)
    _settle(table, costs, ends, layout.limits, moves, shared, shared_low, *flat)
    blocks = np.zeros((len(shared), BLOCKS[grid.type][1]), np.uint8)
    layout.write(blocks, (small, small_low), (shared, shared_low))
    codes = np.empty(table.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # a shared scale beyond float16 makes no numbers of all
        step = (shared[:, None] * small).astype(np.float32)
        minimum = (-shared_low[:, None] * small_low).astype(np.float32)
    _encode(table, ends, step.reshape(-1), minimum.reshape(-1), codes)
    empty = BlockTensor(grid, blocks.reshape(rows, -1))
    return replace_codes(empty, codes.reshape(rows, columns), np.arange(columns))


def _relative(importance: Float32) -> Float32:
    """To the largest of a super-block, float32 (super-blocks of a row, SUPER).

    Not below _LEAST: the sums of a fit are float32 too, and inputs that never mattered decide where
    nothing else does.
    """
    inputs = importance.reshape(-1, SUPER)
    peak = inputs.max(1, keepdims=True)
    relative: Float32 = np.maximum(inputs / np.where(peak > 0, peak, np.float32(1)), _LEAST)
    return relative


@compiled
def _weigh(table: Float32, inputs: Float32, costs: Float32) -> None:
    """Fill `costs` (super-blocks, weights of one): importance times about the magnitude."""
    for block in range(table.shape[0]):
        square = np.float32(0)
        for value in table[block]:
            square += value * value
        floor = _LARGE * square / np.float32(SUPER)
        matter = inputs[block % inputs.shape[0]]
        for j in range(SUPER):
            costs[block, j] = matter[j] * np.sqrt(floor + table[block, j] * table[block, j])


def _shared(scale: Float32, limits: tuple[int, int]) -> tuple[Int16, Float32]:
    """Numbers of few bits and the float16 scale that they share: (blocks, subs), (blocks,)."""
    smallest, largest = limits
    if smallest < 0:  # the largest magnitude on the side that reaches further
        place = np.abs(scale).argmax(1)
        peak = np.take_along_axis(scale, place[:, None], 1)[:, 0] / np.float32(smallest)
    else:
        peak = scale.max(1) / np.float32(largest)
    with np.errstate(over="ignore"):
        shared = peak.astype(np.float16).astype(np.float32)
    divisor = np.where(shared == 0, np.float32(1), shared)
    small = np.clip(np.rint(scale / divisor[:, None]), smallest, largest)
    return np.where(shared[:, None] == 0, 0, small).astype(np.int16), shared


@compiled
def _load(table: Float32, first: int, count: int, tile: Float32) -> None:
    """Rows first .. first + count - 1 into the lanes of `tile`."""
    for lane in range(count):
        for j in range(tile.shape[0]):
            tile[j, lane] = table[first + lane, j]


@compiled
def _fit_with_minimum(
    table: Float32, costs: Float32, top: np.float32, ranges: Float32, scale: Vector, low: Vector
) -> None:
    """Scales and minimums (not above 0) of sub-blocks (groups, size), neither rounded."""
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
        _load(table, first, count, tile)
        _load(costs, first, count, cost)
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
def _fit_signed(
    table: Float32,
    costs: Float32,
    ends: tuple[np.float32, np.float32],
    ranges: Float32,
    scale: Vector,
) -> None:
    """Scales of either sign of sub-blocks (groups, size), not rounded."""
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
        _load(table, first, count, tile)
        _load(costs, first, count, cost)
        for lane in range(LANES):
            peak[lane] = best[lane] = best_scale[lane] = 0
        for j in range(size):
            for lane in range(LANES):
                value = tile[j, lane]
                peak[lane] = value if abs(value) > abs(peak[lane]) else peak[lane]
        for trial in range(ranges.size + 2):
            for lane in range(LANES):
                if trial < ranges.size:
                    inverse[lane] = (
                        -ranges[trial] / peak[lane] if peak[lane] != 0 else np.float32(0)
                    )
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


@compiled
def _settle(
    table: Float32,
    costs: Float32,
    ends: tuple[np.float32, np.float32],
    limits: tuple[int, int],
    moves: Int16,
    shared_scale: Vector,
    shared_low: Vector,
    small_scale: Int16,
    small_low: Int16,
) -> None:
    """Move the small numbers of each sub-block by the one of `moves` that leaves the least error.

    `ends` are the first and last code, `moves` (moves, 2) start with no move.
    """
    groups, size = table.shape
    per = groups // shared_scale.size
    (first_code, last_code), (smallest, largest) = ends, limits
    tile = np.zeros((size, LANES), np.float32)
    cost = np.ones((size, LANES), np.float32)
    low = np.zeros(LANES, np.float32)
    step = np.zeros(LANES, np.float32)
    inverse = np.zeros(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    chosen = np.zeros(LANES, np.int64)
    for begin in range(0, groups, LANES):
        count = min(LANES, groups - begin)
        _load(table, begin, count, tile)
        _load(costs, begin, count, cost)
        best[:] = np.inf
        for move in range(len(moves)):
            for lane in range(count):
                group = begin + lane
                scale, minimum = (
                    small_scale[group] + moves[move, 0],
                    small_low[group] + moves[move, 1],
                )
                step[lane] = shared_scale[group // per] * np.float32(scale)
                low[lane] = -shared_low[group // per] * np.float32(minimum)
                inverse[lane] = np.float32(1) / step[lane] if step[lane] != 0 else np.float32(0)
            error[:] = 0
            for j in range(size):
                for lane in range(LANES):
                    value = tile[j, lane]
                    code = np.rint((value - low[lane]) * inverse[lane])
                    code = first_code if code < first_code else code
                    code = last_code if code > last_code else code
                    miss = value - (low[lane] + step[lane] * code)
                    error[lane] += cost[j, lane] * miss * miss
            for lane in range(count):
                group = begin + lane
                a, b = small_scale[group] + moves[move, 0], small_low[group] + moves[move, 1]
                inside = smallest <= a <= largest and smallest <= b <= largest
                if inside and error[lane] < best[lane]:
                    best[lane], chosen[lane] = error[lane], move
        for lane in range(count):
            small_scale[begin + lane] += moves[chosen[lane], 0]
            small_low[begin + lane] += moves[chosen[lane], 1]


@compiled
def _encode(
    table: Float32, ends: tuple[np.float32, np.float32], step: Vector, low: Vector, codes: UInt8
) -> None:
    """The nearest codes, the first one as 0."""
    first_code, last_code = ends
    for group in range(table.shape[0]):
        inverse = np.float32(1) / step[group] if step[group] != 0 else np.float32(0)
        for j in range(table.shape[1]):
            code = np.rint((table[group, j] - low[group]) * inverse)
            code = first_code if code < first_code else code
            code = last_code if code > last_code else code
            codes[group, j] = np.uint8(np.int32(code - first_code))
