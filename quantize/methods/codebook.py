"""Codebooks such as NF4: the largest magnitude of a group is its scale, the nearest level wins.

The bytes are those of bitsandbytes' `quantize_4bit` without double quantization.
"""

from __future__ import annotations

import numpy as np

from ..grid import Float32, Grid
from ..tensor import QuantizedTensor

_CHUNK = 1 << 20  # weights at a time


def solve(weight: Float32, grid: Grid) -> QuantizedTensor:
    """Quantize a finite matrix (rows, columns), float32, on a grid with levels.

    Rows are independent. An all-zero group has scale 1 and the code of 0. A weight midway between
    two levels takes the lower one.
    """
    assert grid.levels is not None
    rows, columns = weight.shape
    order = np.argsort(grid.levels, kind="stable")
    levels = np.array(grid.levels, np.float64)[order]
    borders = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    codes = np.empty((rows, columns), np.int8)
    scale = np.empty((rows, grid.groups(columns)), np.float32)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        groups = weight[start : start + step].reshape(-1, scale.shape[1], columns // scale.shape[1])
        peak = np.abs(groups).max(-1)
        peak[peak == 0] = 1
        scale[start : start + step] = peak
        level = np.searchsorted(borders, groups * (np.float32(1) / peak)[:, :, None])
        codes[start : start + step] = (order[level] + grid.low).reshape(-1, columns)
    return QuantizedTensor(grid, codes, scale)
