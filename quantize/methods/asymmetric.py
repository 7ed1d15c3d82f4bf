"""Round to nearest where every group has a zero point.

The codes of a group are those of a window of 2 ** bits numbers that holds 0; value = code * scale.
The search shrinks the range of a group's weights in steps, tries where the window may begin, and
keeps what leaves the least squared error. Groups are independent, and every sum keeps its order.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from ..grid import Float32, Grid, Int8, round_scale
from ..tensor import QuantizedTensor

# Of a group's range: from a little more than it to where a good quarter of it would be clipped.
_SHRINKS = np.linspace(1.05, 0.7, 15, dtype=np.float32)
_WHOLE = np.ones(1, np.float32)


def solve(
    weight: Float32, grid: Grid, search: bool = True, importance: Float32 | None = None
) -> QuantizedTensor:
    """Quantize a finite matrix (rows, columns), float32, on an asymmetric grid.

    Args:
        search: for the range with the least squared error; without, the whole range.
        importance: float32 (columns,), what the squared error of each input counts.
    """
    assert grid.asymmetric
    rows, columns = weight.shape
    groups = grid.groups(columns)
    table = np.ascontiguousarray(weight, np.float32).reshape(rows * groups, -1)
    counts = np.ones(columns, np.float32) if importance is None else importance
    counts = np.ascontiguousarray(counts, np.float32).reshape(groups, -1)
    low = table.min(1, initial=0)
    width = table.max(1, initial=0) - low
    shrinks = _SHRINKS if search else _WHOLE
    scales = np.stack([round_scale(width * (s / (2**grid.bits - 1))) for s in shrinks], axis=1)
    codes = np.empty(table.shape, np.int8)
    scale = np.empty(len(table), np.float32)
    _solve(table, counts, low, shrinks, scales, 2**grid.bits - 1, codes, scale)
    return QuantizedTensor(grid, codes.reshape(weight.shape), scale.reshape(rows, groups))


@compiled
def _solve(
    table: Float32,
    counts: Float32,
    low: Float32,
    shrinks: Float32,
    scales: Float32,
    span: int,
    codes: Int8,
    scale: Float32,
) -> None:
    """Codes and scales of the groups of `table` (groups, size), of candidates `scales`."""
    size = table.shape[1]
    for group in range(table.shape[0]):
        count = counts[group % counts.shape[0]]
        least, best, begins = np.float32(np.inf), 0, 0
        for candidate in range(scales.shape[1]):
            step = scales[group, candidate]
            middle = int(np.rint(-low[group] * shrinks[candidate] / step))
            for zero in range(max(middle - 1, 0), min(middle + 1, span) + 1):
                error = np.float32(0)
                for j in range(size):
                    code = np.rint(table[group, j] / step)
                    code = min(max(code, np.float32(-zero)), np.float32(span - zero))
                    miss = table[group, j] - code * step
                    error += count[j] * miss * miss
                if error < least:
                    least, best, begins = error, candidate, zero
        step = scales[group, best]
        scale[group] = step
        for j in range(size):
            code = np.rint(table[group, j] / step)
            codes[group, j] = np.int8(min(max(code, -begins), span - begins))
