"""What rounding takes from weights: squared errors, and the part that the limits of scales add."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .blocks import BlockGrid, BlockTensor, Quantized
from .compiled import compiled
from .grid import SCALE_CEILING, SCALE_FLOOR, Float32, Grid, Int8
from .methods import kquants, rtn

_SMALL_ROW = 2.0**-8  # rows below it may need scales of blocks that float16 rounds coarsely
_LANES = 32


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums of squares over some weights: of their errors, of themselves.

    Attributes:
        added: the part of `error` that comes from the limits of scales.
    """

    error: float
    norm: float
    added: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error + other.error, self.norm + other.norm, self.added + other.added)

    @property
    def relative(self) -> float:
        """RMSE, relative to that of the weights."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    @property
    def without_limits(self) -> float:
        """The same if scales had no limits."""
        return math.sqrt(max(self.error - self.added, 0.0) / self.norm) if self.norm else 0.0


NOTHING = Loss(0.0, 0.0, 0.0)


def measure(values: Float32, tensor: Quantized) -> Loss:
    """Of contiguous rows of a weight, float32 (rows, columns), and what became of them."""
    if isinstance(tensor, BlockTensor):
        error = _squared(values - tensor.dequantize())
        return Loss(error, _squared(values), _added_to_small_rows(values, tensor.grid))
    scale = tensor.scale.reshape(-1)
    table = values.reshape(scale.size, -1)
    error, norm = _squares(table, tensor.codes.reshape(table.shape), scale)
    return Loss(error, norm, _added_by_limits(table, scale, tensor.grid))


def _added_by_limits(table: Float32, scale: Float32, grid: Grid) -> float:
    """Squared error that SCALE_FLOOR and SCALE_CEILING add to the groups of `table`.

    The same groups are solved again times a power of two that takes their scales off the limits.
    """
    alone = replace(grid, group=None)  # each group as a row of its own
    added = 0.0
    for limit, power in ((SCALE_FLOOR, 2.0**30), (SCALE_CEILING, 2.0**-30)):
        bound = table[np.abs(scale) == limit]
        if bound.size:
            added += _rtn_error(bound, alone)
            added -= _rtn_error(bound * np.float32(power), alone) / power**2
    return max(added, 0.0)


def _added_to_small_rows(values: Float32, grid: BlockGrid) -> float:
    """Squared error that float16's end adds to blocks, whose scales of scales are the smallest.

    The same rows are rounded again times a power of two, as above.
    """
    peak = np.abs(values).max(1)
    small = values[(peak > 0) & (peak < _SMALL_ROW)]
    if not small.size:
        return 0.0
    power = 2.0**20
    raised = _block_error(small * np.float32(power), grid) / power**2
    return max(_block_error(small, grid) - raised, 0.0)


def _block_error(values: Float32, grid: BlockGrid) -> float:
    alike = np.ones(values.shape[1], np.float32)
    return _squared(values - kquants.round_blocks(values, grid, alike).dequantize())


def _rtn_error(table: Float32, grid: Grid) -> float:
    tensor = rtn.solve(table, grid)
    return _squares(table, tensor.codes, tensor.scale.reshape(-1))[0]


@compiled
def _squares(table: Float32, codes: Int8, scale: Float32) -> tuple[float, float]:
    """Sums of squares over `table` (groups, size): of its error under codes and scale, of itself.

    In lanes, as everything that has to be the same on any CPU.
    """
    error = np.zeros(_LANES)
    norm = np.zeros(_LANES)
    groups, size = table.shape
    whole = size - size % _LANES
    for group in range(groups):
        step = scale[group]
        for first in range(0, whole, _LANES):
            for lane in range(_LANES):
                value = table[group, first + lane]
                miss = value - step * np.float32(codes[group, first + lane])
                error[lane] += miss * miss
                norm[lane] += value * value
        for j in range(whole, size):
            value = table[group, j]
            miss = value - step * np.float32(codes[group, j])
            error[j - whole] += miss * miss
            norm[j - whole] += value * value
    return error.sum(), norm.sum()


@compiled
def _squared(values: Float32) -> float:
    """Sum of squares of a matrix, in lanes."""
    total = np.zeros(_LANES)
    flat = values.reshape(-1)
    whole = flat.size - flat.size % _LANES
    for first in range(0, whole, _LANES):
        for lane in range(_LANES):
            total[lane] += flat[first + lane] * flat[first + lane]
    for j in range(whole, flat.size):
        total[j - whole] += flat[j] * flat[j]
    return float(total.sum())
