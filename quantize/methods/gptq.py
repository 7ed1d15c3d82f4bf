"""GPTQ: choose codes one input column at a time, later columns making up for earlier errors.

Frantar et al. 2022 (arXiv:2210.17323), with scales fixed up front (static groups) and columns in
the order of their importance (act-order). Written as feedback through the factor H = L D L^T,
which chooses the same codes without inverting H (Chee et al. 2023, arXiv:2307.13304, theorem 6).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BadInput
from ..blocks import AnyGrid, BlockGrid, BlockTensor, Quantized
from ..codes import CODES
from ..compiled import compiled
from ..grid import Float32, Int8, UInt8
from ..palette import PaletteGrid, PaletteTensor
from ..recode import low_and_step, replace_codes
from ..tensor import QuantizedTensor
from . import kmeans, kquants, rtn

_DAMPINGS = (0.01, 0.1, 1.0)  # of the mean diagonal; the next one only if the factor fails
_GIVEN_BACK = np.float32(0.5)  # of the drift; all of it fits the calibration text too closely
_BLOCK = 128  # columns between two updates by matrix product
_STRIP = 4  # columns whose errors reach the others of their block together
_LANES = 32  # rows that are rounded side by side

Indices = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float32]


def solve(
    weight: Float32, grid: AnyGrid, hessian: Float32, drift: Float32 | None = None
) -> Quantized:
    """Quantize so that the outputs, not the weights, change least.

    Args:
        weight: float32 (rows, columns), finite.
        grid: its scales are those of RTN's search, with the Hessian's diagonal as importance for a
            ggml type; of these all in `codes.CODES`. Palettized, its levels are those of k-means,
            with that importance.
        hessian: float32 (columns, columns), mean of x x^T over inputs x. A column that was never
            active (zero on the diagonal) keeps its RTN codes.
        drift: float32 (rows, columns), mean of d x^T; d is what earlier errors took from the
            outputs. Half of what the inputs x can give back of it is added to the weights first.

    Raises:
        BadInput: the Hessian has another shape, is not finite or has no positive definite part.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise _unusable(f"its shape is {hessian.shape} for {columns} columns")
    importance = np.ascontiguousarray(hessian.diagonal())
    if not np.isfinite(importance).all():
        raise _unusable("its diagonal is not finite")
    order = np.argsort(importance, kind="stable")
    order = order[importance[order] > 0]
    if order.size == 0:
        return _rounded(weight, grid, None)
    factor = _factor(hessian, order)
    if drift is not None:
        weight = weight.copy()
        weight[:, order] += _correction(drift, order, factor)
    rounded = _rounded(weight, grid, importance)
    codes = _feedback(_taken(weight, order), _levels(rounded, order), _unit(factor))
    if isinstance(rounded, BlockTensor):
        return replace_codes(rounded, codes.view(np.uint8), order)
    if isinstance(rounded, QuantizedTensor) and rounded.grid.asymmetric:
        codes -= _begins(rounded, order).view(np.int8)
    _by_rows(_put, codes, order, rounded.codes)
    return rounded


def _rounded(weight: Float32, grid: AnyGrid, importance: Float32 | None) -> Quantized:
    """Scales or levels, and the codes of columns that are not chosen here."""
    if isinstance(grid, BlockGrid):
        return kquants.round_blocks(weight, grid, importance)
    if isinstance(grid, PaletteGrid):
        return _by_kmeans(weight, grid, importance)
    parts = _solved(partial(rtn.solve, grid=grid, importance=importance), weight, 1)
    codes, scales = ([getattr(part, name) for part in parts] for name in ("codes", "scale"))
    return QuantizedTensor(grid, np.concatenate(codes), np.concatenate(scales))


def _by_kmeans(weight: Float32, grid: PaletteGrid, importance: Float32 | None) -> PaletteTensor:
    solve = partial(kmeans.solve, grid=grid, importance=importance)
    parts = _solved(solve, weight, grid.group)
    codes, levels = ([getattr(part, name) for part in parts] for name in ("codes", "levels"))
    return PaletteTensor(grid, np.concatenate(codes), np.concatenate(levels))


def _solved(solve: Callable[[Float32], Any], weight: Float32, group: int) -> list[Any]:
    """Some rows, whole groups of them, in each thread."""
    ends = [group * edge for edge in _edges(len(weight) // group)]
    rows = [weight[start:stop] for start, stop in pairwise(ends) if start < stop]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(solve, rows))


class _Levels(NamedTuple):
    """What codes mean: value = low + step * level.

    Attributes:
        low, step: float32 (rows, groups).
        groups: int64 (columns,), the group of each column.
        first, last: the smallest and the largest code.
        levels: float32 (sets, codes), the level of each code; without codes: a code is its level.
        between: float32 (sets, codes - 1), the levels' midpoints; empty likewise.
        share: consecutive rows that have one set of levels.
    """

    low: Float32
    step: Float32
    groups: Indices
    first: np.float32
    last: np.float32
    levels: Float32
    between: Float32
    share: int


def _levels(rounded: Quantized, order: Indices) -> _Levels:
    rows, nothing = rounded.shape[0], np.empty((1, 0), np.float32)
    if isinstance(rounded, PaletteTensor):
        zero, levels = np.zeros((rows, 1), np.float32), rounded.levels
        ends = np.float32(0), np.float32(rounded.grid.size - 1)
        own = levels, kmeans.midpoints(levels)
        return _Levels(zero, zero + 1, np.zeros_like(order), *ends, *own, rounded.grid.group)
    if isinstance(rounded, QuantizedTensor):
        grid, scale = rounded.grid, rounded.scale
        groups = order // grid.group if grid.group else np.zeros_like(order)
        ends = np.float32(grid.low), np.float32(grid.high)
        low = np.zeros_like(scale)
        if grid.asymmetric:  # codes are counted from the zero points of RTN's on
            ends = np.float32(0), np.float32(2**grid.bits - 1)
            low -= scale * grid.zero_points(rounded.codes)
        return _Levels(low, scale, groups, *ends, nothing, nothing, rows)
    known = CODES[rounded.grid.type]
    levels = nothing if known.even else known.levels[None]
    ends = np.float32(0), np.float32(len(known.levels) - 1)
    own = levels, kmeans.midpoints(levels)
    return _Levels(*low_and_step(rounded), order // known.group, *ends, *own, rows)


def _begins(rounded: QuantizedTensor, order: Indices) -> UInt8:
    """The zero point of each weight: uint8 (rows, len(order))."""
    points = rounded.grid.zero_points(rounded.codes)
    return points[:, order // (rounded.shape[1] // points.shape[1])]


def _factor(hessian: Float32, order: Indices) -> Tensor:
    """Upper triangular U of the damped Hessian = U^T U, in `order`."""
    ordered = torch.from_numpy(_ordered(hessian, order))
    mean = ordered.diagonal().mean()
    upper: Tensor
    added = 0.0
    for damping in _DAMPINGS:
        ordered.diagonal().add_(mean * (damping - added))
        added = damping
        upper, failed = torch.linalg.cholesky_ex(ordered, upper=True)
        if not failed:
            return upper
    raise _unusable(f"it is not positive definite with {added:.0%} of its mean diagonal added")


def _ordered(hessian: Float32, order: Indices) -> Float32:
    """Rows and columns in `order`; zeros below the diagonal, which no factor is made from."""
    found = np.zeros((order.size, order.size), np.float32)
    _by_rows(_gather, found, hessian, order)
    return found


def _taken(weight: Float32, order: Indices) -> Float32:
    """The columns of `weight` in `order`."""
    found = np.empty((len(weight), order.size), np.float32)
    _by_rows(_take, found, weight, order)
    return found


def _by_rows(work: Callable[..., None], first: Any, *others: Any) -> None:
    """Call work(first, *others, start, stop) with the rows of `first` in parts, in threads."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(partial(work, first, *others), *_parts(len(first))))


@compiled
def _gather(found: Float32, hessian: Float32, order: Indices, start: int, stop: int) -> None:
    for i in range(start, stop):
        row = hessian[order[i]]
        for j in range(i, order.size):
            found[i, j] = row[order[j]]


@compiled
def _take(found: Float32, weight: Float32, order: Indices, start: int, stop: int) -> None:
    for i in range(start, stop):
        for j in range(order.size):
            found[i, j] = weight[i, order[j]]


@compiled
def _put(codes: Int8, order: Indices, found: Int8, start: int, stop: int) -> None:
    for i in range(start, stop):
        for j in range(order.size):
            found[i, order[j]] = codes[i, j]


def _unit(factor: Tensor) -> Tensor:
    """The factor divided by its diagonal and transposed: unit lower triangular. In place."""
    lower, diagonal = factor.mT, factor.diagonal().clone()
    for start in range(0, len(lower), _BLOCK):
        stop = start + _BLOCK
        lower[start:stop, :stop] /= diagonal[:stop]
    return lower


def _correction(drift: Float32, order: Indices, factor: Tensor) -> Float32:
    """The change of the weights that gives back part of the drift: drift * (U^T U)^-1."""
    columns = torch.from_numpy(drift[:, order]).mT
    solved: Float32 = torch.cholesky_solve(columns, factor, upper=True).mT.numpy()
    return solved * _GIVEN_BACK


def _feedback(weight: Float32, levels: _Levels, factor: Tensor) -> Int8:
    """Codes (rows, columns) of `weight`, chosen from the last column to the first.

    Column j is rounded after adding sum(error[i] * factor[i, j]) over the columns i > j, whose
    error is weight - value of the code; `factor` is unit lower triangular.
    """
    columns = weight.shape[1]
    codes = np.empty(weight.shape, np.int8)
    errors = torch.empty(weight.shape)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for stop in range(columns, 0, -_BLOCK):
            block = slice(max(0, stop - _BLOCK), stop)
            target = torch.from_numpy(weight[:, block].copy())
            target.addmm_(errors[:, stop:], factor[stop:, block])
            choose = partial(
                _choose,
                weight[:, block],
                target.numpy(),
                levels._replace(groups=levels.groups[block]),
                factor[block, block].contiguous().numpy(),
                codes[:, block],
                errors[:, block].numpy(),
            )
            list(pool.map(choose, *_parts(len(weight))))
    return codes


def _parts(rows: int) -> tuple[list[int], list[int]]:
    """First rows and last rows + 1, one part for every thread."""
    edges = _edges(rows)
    return edges[:-1], edges[1:]


def _edges(count: int) -> list[int]:
    edges: list[int] = np.linspace(0, count, torch.get_num_threads() + 1).astype(int).tolist()
    return edges


@compiled
def _choose(
    weight: Float32,
    target: Float32,
    levels: _Levels,
    factor: Float32,
    codes: Int8,
    errors: Float32,
    start: int,
    stop: int,
) -> None:
    """Codes and errors of rows start .. stop - 1 in one block of columns, last column first.

    Rows lie side by side in tiles of _LANES, so that the loops vectorize; each row's sums keep
    their order.
    """
    columns = weight.shape[1]
    tile = np.zeros((columns, _LANES), np.float32)  # targets, and in their place errors
    exact = np.zeros((columns, _LANES), np.float32)
    chosen = np.zeros((columns, _LANES), np.int8)
    low = np.zeros(_LANES, np.float32)
    step = np.ones(_LANES, np.float32)
    code = np.zeros(_LANES, np.float32)
    for first in range(start, stop, _LANES):
        count = min(_LANES, stop - first)
        for lane in range(count):
            for j in range(columns):
                tile[j, lane] = target[first + lane, j]
                exact[j, lane] = weight[first + lane, j]
        for high in range(columns, 0, -_STRIP):
            begin = max(0, high - _STRIP)
            for j in range(high - 1, begin - 1, -1):
                group = levels.groups[j]
                for lane in range(count):
                    low[lane] = levels.low[first + lane, group]
                    step[lane] = levels.step[first + lane, group]
                for lane in range(_LANES):
                    code[lane] = (tile[j, lane] - low[lane]) / step[lane]
                _round(code, step, levels, first, count)
                for lane in range(_LANES):
                    chosen[j, lane] = np.int8(code[lane])
                if levels.levels.size:
                    for lane in range(count):
                        own = levels.levels[(first + lane) // levels.share]
                        code[lane] = own[int(code[lane])]
                for lane in range(_LANES):
                    tile[j, lane] = exact[j, lane] - (low[lane] + code[lane] * step[lane])
                for i in range(begin, j):
                    for lane in range(_LANES):
                        tile[i, lane] += tile[j, lane] * factor[j, i]
            if begin:
                _pass_on(tile, factor, begin)
        for lane in range(count):
            for j in range(columns):
                errors[first + lane, j] = tile[j, lane]
                codes[first + lane, j] = chosen[j, lane]


@compiled
def _pass_on(tile: Float32, factor: Float32, begin: int) -> None:
    """The errors of the _STRIP columns from `begin` on to those before, the last one's first."""
    for i in range(begin):
        third, second = factor[begin + 3, i], factor[begin + 2, i]
        first, zeroth = factor[begin + 1, i], factor[begin, i]
        for lane in range(_LANES):
            moved = tile[i, lane] + tile[begin + 3, lane] * third
            moved += tile[begin + 2, lane] * second
            moved += tile[begin + 1, lane] * first
            tile[i, lane] = moved + tile[begin, lane] * zeroth


@compiled
def _round(code: Vector, step: Vector, levels: _Levels, first: int, count: int) -> None:
    """In place, what is wanted of each row from `first` on, in steps, to the nearest level's code.

    It is the first code where all are equal.
    """
    lowest, highest = levels.first, levels.last
    if levels.between.size:
        for lane in range(count):
            between = levels.between[(first + lane) // levels.share]
            code[lane] = np.searchsorted(between, code[lane])
    else:
        for lane in range(code.size):
            nearest = np.rint(code[lane])
            nearest = lowest if nearest < lowest else nearest
            code[lane] = highest if nearest > highest else nearest
    for lane in range(code.size):
        code[lane] = lowest if step[lane] == 0 else code[lane]


def _unusable(why: str) -> BadInput:
    return BadInput(
        "the Hessian of a weight is unusable", why, "calibrate on another text, or use --method rtn"
    )
