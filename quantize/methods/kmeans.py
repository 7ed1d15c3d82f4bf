"""K-means: the levels of a palettized grid that leave the least squared error in each row group.

Sensitive k-means (SqueezeLLM, Kim et al. 2023, arXiv:2306.07629, sensitivity-based non-uniform
quantization) weighs each error; here by the importance of its input, as the layer's outputs do if
errors are independent. Clusters of numbers are intervals of the sorted ones, so that dynamic
programming finds the best (Wang and Song 2011, The R Journal 3/2): with borders at 1,024 places,
which Lloyd's iterations then move to where they belong. Lloyd's alone, from quantiles, ends with
several times that error at 64 levels.

Sums run in the order of the weights, in float64: the same bytes on any CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..grid import Float32, Int8
from ..palette import PaletteGrid, PaletteTensor, round_levels

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_PLACES = 1024  # for borders: half of them at even shares of the weights, half at even distances
_ITERATIONS = 100  # of Lloyd's; few are needed
_LEAST = 1e-5  # importance, of the largest: inputs that never mattered decide where no other does


def solve(weight: Float32, grid: PaletteGrid, importance: Float32 | None = None) -> PaletteTensor:
    """Quantize a finite matrix (rows, columns), float32: k-means, then the nearest level for each.

    Row groups are independent, so blocks of whole groups give the codes of the whole matrix, and
    may be solved in several threads. Levels ascend. An all-zero group has zero levels and codes.

    Args:
        importance: float32 (columns,), the mean of x^2 of each input; None: errors count alike.
    """
    levels = find_levels(weight, grid, importance)
    return PaletteTensor(grid, encode(weight, levels), levels)


def find_levels(weight: Float32, grid: PaletteGrid, importance: Float32 | None = None) -> Float32:
    """Ascending levels, exact in float16, of every row group: float32 (groups, 2 ** bits)."""
    rows, columns = weight.shape
    groups = np.ascontiguousarray(weight, np.float32).reshape(rows // grid.group, -1)
    inputs = np.ones(columns)
    if importance is not None and importance.any():
        known = np.nan_to_num(importance).astype(np.float64)  # squares may be beyond float32
        inputs = np.maximum(known / known.max(), _LEAST)
    found = np.empty((len(groups), grid.size))
    for index, group in enumerate(groups):
        order = np.argsort(group, kind="stable")
        values = group[order].astype(np.float64)
        _solve(values, inputs[order % columns], _places(values), found[index])
    return round_levels(found.astype(np.float32))


def encode(weight: Float32, levels: Float32) -> Int8:
    """The nearest level of every weight: int8 (rows, columns); midway between two, the lower."""
    codes = np.empty(weight.shape, np.int8)
    _encode(weight, levels, midpoints(levels), codes)
    return codes


def midpoints(levels: Float32) -> Float32:
    """Where the nearest level changes: float32 (groups, levels - 1)."""
    found: Float32 = (levels[:, 1:] + levels[:, :-1]) / np.float32(2)
    return found


def _places(values: Float64) -> Indices:
    """Where a border may stand among sorted values: ascending, from 0 to all of them."""
    count = values.size
    if count <= _PLACES:
        return np.arange(count + 1)
    shares = np.arange(_PLACES // 2 + 1) * count // (_PLACES // 2)
    even = values[0] + (values[-1] - values[0]) * np.arange(1, _PLACES // 2) / (_PLACES // 2)
    return np.unique(np.concatenate([shares, np.searchsorted(values, even)]))


@compiled
def _solve(values: Float64, weights: Float64, places: Indices, levels: Float64) -> None:
    """K-means of sorted values; fills `levels`."""
    weight = np.zeros(values.size + 1)  # sums over all values before each
    moment = np.zeros(values.size + 1)
    for i in range(values.size):
        weight[i + 1] = weight[i] + weights[i]
        moment[i + 1] = moment[i] + weights[i] * values[i]
    borders = _partition(weight[places], moment[places], levels.size)
    for cluster in range(borders.size):
        borders[cluster] = places[borders[cluster]]
    for _ in range(_ITERATIONS):
        _average(values, weight, moment, borders, levels)
        moved = False
        for cluster in range(1, levels.size):
            middle = (levels[cluster - 1] + levels[cluster]) / 2
            border = np.searchsorted(values, middle, side="right")
            moved |= border != borders[cluster]
            borders[cluster] = border
        if not moved:
            break
    _average(values, weight, moment, borders, levels)


@compiled
def _average(
    values: Float64, weight: Float64, moment: Float64, borders: Indices, levels: Float64
) -> None:
    """The mean of each cluster; of an empty one the value at its place."""
    for cluster in range(levels.size):
        start, stop = borders[cluster], borders[cluster + 1]
        if stop > start:
            levels[cluster] = (moment[stop] - moment[start]) / (weight[stop] - weight[start])
        else:
            levels[cluster] = values[min(start, values.size - 1)]


@compiled
def _partition(weight: Float64, moment: Float64, clusters: int) -> Indices:
    """Borders of the clusters with the least error, as indices of the sums that are given.

    A cluster takes moment^2 / weight off the sum of squares; best[j] is what the clusters so far
    take off the values before place j. The last border before j never moves back as j grows, so
    the middle place bounds the search for those on either side: clusters * places * log(places).
    """
    last = weight.size - 1
    best = np.zeros(last + 1)
    for j in range(1, last + 1):
        best[j] = moment[j] * moment[j] / weight[j]
    longer = np.zeros(last + 1)
    before = np.zeros((clusters, last + 1), np.int32)  # the last border, by clusters and place
    waiting = np.empty((64, 4), np.int64)  # first and last place, first and last border
    for cluster in range(1, clusters):
        waiting[0] = np.array([0, last, 0, last])
        count = 1
        while count:
            count -= 1
            first, final, low, high = waiting[count]
            j = (first + final) // 2
            found, place = -1.0, low
            for i in range(low, min(j, high) + 1):
                gain = best[i]
                if i < j:
                    mass, sum_ = weight[j] - weight[i], moment[j] - moment[i]
                    gain += sum_ * sum_ / mass
                if gain > found:
                    found, place = gain, i
            longer[j], before[cluster, j] = found, place
            if first < j:
                waiting[count] = np.array([first, j - 1, low, place])
                count += 1
            if j < final:
                waiting[count] = np.array([j + 1, final, place, high])
                count += 1
        best, longer = longer, best
    borders = np.empty(clusters + 1, np.int64)
    borders[clusters], borders[0] = last, 0
    for cluster in range(clusters - 1, 0, -1):
        borders[cluster] = before[cluster, borders[cluster + 1]]
    return borders


@compiled
def _encode(weight: Float32, levels: Float32, between: Float32, codes: Int8) -> None:
    share = weight.shape[0] // levels.shape[0]
    for row in range(weight.shape[0]):
        own = between[row // share]
        for j in range(weight.shape[1]):
            codes[row, j] = np.searchsorted(own, weight[row, j])
