"""Half-quadratic quantization: scales for which few errors are large, without calibration.

HQQ (Badri and Shaji 2023, mobiusml.github.io/hqq_blog) finds the zero point of least sum |e|^p of
the errors e, p < 1, which leaves outliers outside: each step shrinks the errors to what is worth
an exception and fits the rest by least squares. Our grids have no zero point, so here the scale is
fitted, from that of rtn's search. Errors are counted in steps of the first scale, not in units of
the weight, so that the same weights times a power of two get the same codes. p is 3/4: roots of
roots are exact on any CPU.

Groups lie side by side in tiles of LANES, one sum to a lane: that is what lets the loops vectorize
while the order of every sum, and so every byte, is the same on any CPU.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from ..grid import Float32, Grid, round_scale
from ..tensor import QuantizedTensor
from . import rtn
from .fit import LANES, Vector

_STEPS = 20
# What an error costs beside an exception. At first only clipped weights are worth one; with 10, as
# in HQQ, every larger error is, and KL was up to ten times higher at 2 bits.
_FIRST = np.float32(1)
_GROWS = np.float32(1.01)  # with every step, as in HQQ


def solve(weight: Float32, grid: Grid) -> QuantizedTensor:
    """Quantize a finite matrix (rows, columns), float32, on a grid without levels.

    Rows are independent, so blocks of rows give the codes of the whole matrix.
    """
    first = rtn.find_scale(weight, grid)
    rows, groups = first.shape
    table = np.ascontiguousarray(weight, np.float32).reshape(rows * groups, -1)
    scale = first.reshape(-1).copy()
    _improve(table, np.float32(grid.low), np.float32(grid.high), scale)
    rounded = round_scale(scale.reshape(rows, groups))
    return QuantizedTensor(grid, rtn.encode(weight, rounded, grid), rounded)


@compiled
def _improve(table: Float32, low: np.float32, high: np.float32, scale: Vector) -> None:
    """Replace the scales of the groups of `table` (groups, size) by those of least sum |e|^p."""
    groups, size = table.shape
    tile = np.zeros((size, LANES), np.float32)
    unit = np.ones(LANES, np.float32)
    factor = np.empty(LANES, np.float32)  # the scale, in units
    best = np.empty(LANES, np.float32)
    least = np.empty(LANES, np.float32)
    missed = np.empty(LANES, np.float32)
    dot = np.empty(LANES, np.float32)
    norm = np.empty(LANES, np.float32)
    for begin in range(0, groups, LANES):
        count = min(LANES, groups - begin)
        for lane in range(count):
            unit[lane] = scale[begin + lane]
            for j in range(size):
                tile[j, lane] = table[begin + lane, j] / unit[lane]
        factor[:] = best[:] = 1
        least[:] = np.inf
        cost = _FIRST
        for _ in range(_STEPS + 1):
            missed[:] = dot[:] = norm[:] = 0
            for j in range(size):
                for lane in range(LANES):
                    value = tile[j, lane]
                    code = np.rint(value / factor[lane])
                    code = low if code < low else code
                    code = high if code > high else code
                    error = value - factor[lane] * code
                    size_ = abs(error)
                    root = np.sqrt(size_)
                    fourth = np.sqrt(root)
                    missed[lane] += root * fourth
                    over = size_ - np.float32(1) / (cost * fourth)  # |e| - |e|^(p-1) / cost
                    exception = over if over > 0 else np.float32(0)  # also where e is 0
                    exception = -exception if error < 0 else exception
                    dot[lane] += code * (value - exception)
                    norm[lane] += code * code
            for lane in range(LANES):
                if missed[lane] < least[lane]:
                    least[lane] = missed[lane]
                    best[lane] = factor[lane]
                fitted = dot[lane] / norm[lane]
                factor[lane] = fitted if fitted > 0 else factor[lane]
            cost *= _GROWS
        for lane in range(count):
            scale[begin + lane] = unit[lane] * best[lane]
