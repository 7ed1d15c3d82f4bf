"""What rounding takes from weights: squared errors, and the part that the limits of scales add."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .blocks import BlockGrid, BlockTensor, Quantized
from .compiled import compiled
from .grid import SCALE_CEILING, SCALE_FLOOR, Float32, Grid, Int8
from .methods import kmeans, kquants, rtn
from .palette import PaletteGrid, PaletteTensor

# Rows whose largest weight lies outside may need scales of blocks, or levels, that float16 rounds
# coarsely, or does not reach.
_ORDINARY = 2.0**-8, 2.0**16
_LANES = 32


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums of squares over some weights: of their errors, of themselves.

    Attributes:
        added: the part of `error` that comes from the limits of scales and levels.
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
        added = _added_to_odd(values, lambda rows: _block_error(rows, tensor.grid))
        return Loss(error, _squared(values), added)
    if isinstance(tensor, PaletteTensor):
        error, grid = _squared(values - tensor.dequantize()), tensor.grid
        groups = values.reshape(len(tensor.levels), -1)
        added = _added_to_odd(groups, lambda odd: _palette_error(odd, grid))
        return Loss(error, _squared(values), added)
    if tensor.grid.levels is not None:
        return Loss(_squared(values - tensor.dequantize()), _squared(values), 0.0)
    scale = tensor.scale.reshape(-1)
    table = values.reshape(scale.size, -1)
    error, norm = _squares(table, tensor.codes.reshape(table.shape), scale)
    return Loss(error, norm, _added_by_limits(table, scale, tensor.grid))


def _added_by_limits(table: Float32, scale: Float32, grid: Grid) -> float:
    """Squared error that SCALE_FLOOR and SCALE_CEILING add to the groups of `table`.

    The same groups are solved again times a power of two that takes their scales off the limits.
    """
    alone = replace(grid, group=None)  # each group as a row of its own
    return sum(
        _added(table[np.abs(scale) == limit], lambda groups: _rtn_error(groups, alone))
        for limit in (SCALE_FLOOR, SCALE_CEILING)
    )


def _added_to_odd(values: Float32, error: Callable[[Float32], float]) -> float:
    """The same for the ends of float16, in scales of blocks and in levels, by rows of `values`."""
    peak = np.abs(values).max(1)
    least, most = _ORDINARY
    return sum(_added(values[odd], error) for odd in ((peak > 0) & (peak < least), peak > most))


def _added(values: Float32, error: Callable[[Float32], float]) -> float:
    """What an error loses when the largest magnitude is brought to between 1/2 and 1."""
    if not values.any():
        return 0.0
    _, exponent = math.frexp(np.abs(values).max())
    raised = np.ldexp(values, -exponent)
    return max(error(values) - math.ldexp(error(raised), 2 * exponent), 0.0)


def _block_error(values: Float32, grid: BlockGrid) -> float:
    alike = np.ones(values.shape[1], np.float32)
    return _squared(values - kquants.round_blocks(values, grid, alike).dequantize())


def _palette_error(groups: Float32, grid: PaletteGrid) -> float:
    """Of k-means; a row of `groups` is a row group."""
    weight = groups.reshape(len(groups) * grid.group, -1)
    return _squared(weight - kmeans.solve(weight, grid).dequantize())


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
