"""Round to nearest in ggml's super-blocks: scales by search.

A super-block of 256 weights has sub-blocks of 16 or 32 with a scale of few bits each, of the scale
that all share; Q2_K, Q4_K and Q5_K also have minimums (block layouts: ggml's `ggml-common.h`). Each
sub-block is fitted by least squares to the codes of a fixed set of ranges; then the shared scale is
chosen, and of each sub-block's nearest numbers of few bits those that leave the least error.
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
from . import fit
from .fit import LANES, Vector

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
        importance: float32 (columns,), the mean of x^2 of each input, or None; see fit.costs.
    """
    layout, size = LAYOUTS[grid.type], CODES[grid.type].group
    rows, columns = weight.shape
    table = np.ascontiguousarray(weight, np.float32).reshape(-1, size)
    ranges = _RANGES[grid.type].astype(np.float32)
    costs = fit.costs(table, importance, SUPER)
    first = np.float32(layout.first)
    ends = first, first + np.float32(len(CODES[grid.type].levels) - 1)
    scale, low = np.empty(len(table), np.float32), np.zeros(len(table), np.float32)
    if layout.signed:
        fit.alone(table, costs, ends, ranges, True, scale)
    else:
        fit.with_minimum(table, costs, ends[1], ranges, scale, low)
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
        fit.load(table, costs, begin, count, tile, cost)
        best[:] = np.inf
        for move in range(len(moves)):
            for lane in range(count):
                group = begin + lane
                a, b = small_scale[group] + moves[move, 0], small_low[group] + moves[move, 1]
                step[lane] = shared_scale[group // per] * np.float32(a)
                low[lane] = -shared_low[group // per] * np.float32(b)
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
