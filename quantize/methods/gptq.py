"""GPTQ: choose codes one input column at a time, later columns making up for earlier errors.

Frantar et al. 2022 (arXiv:2210.17323), with scales fixed up front (static groups) and columns in
the order of their importance (act-order). Written as feedback through the factor H = L D L^T,
which chooses the same codes without inverting H (Chee et al. 2023, arXiv:2307.13304, theorem 6).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import NamedTuple

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
    factor /= factor.diagonal()[:, None].clone()
    codes = _feedback(weight[:, order], _levels(rounded, order), factor.mT)
    if isinstance(rounded, BlockTensor):
        return replace_codes(rounded, codes.view(np.uint8), order)
    if isinstance(rounded, QuantizedTensor) and rounded.grid.asymmetric:
        codes -= _begins(rounded, order).view(np.int8)
    rounded.codes[:, order] = codes
    return rounded


def _rounded(weight: Float32, grid: AnyGrid, importance: Float32 | None) -> Quantized:
    """Scales or levels, and the codes of columns that are not chosen here."""
    if isinstance(grid, BlockGrid):
        return kquants.round_blocks(weight, grid, importance)
    if isinstance(grid, PaletteGrid):
        return _by_kmeans(weight, grid, importance)
    return rtn.solve(weight, grid, importance=importance)


def _by_kmeans(weight: Float32, grid: PaletteGrid, importance: Float32 | None) -> PaletteTensor:
    """Some row groups in each thread."""
    solve = partial(kmeans.solve, grid=grid, importance=importance)
    ends = [grid.group * edge for edge in _edges(len(weight) // grid.group)]
    rows = [weight[start:stop] for start, stop in pairwise(ends) if start < stop]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(solve, rows))
    codes, levels = ([getattr(part, name) for part in parts] for name in ("codes", "levels"))
    return PaletteTensor(grid, np.concatenate(codes), np.concatenate(levels))


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
    ordered = torch.from_numpy(hessian[np.ix_(order, order)])
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
    """Codes and errors of rows start .. stop - 1 in one block of columns, last column first."""
    for row in range(start, stop):
        own, between = levels.levels[row // levels.share], levels.between[row // levels.share]
        for j in range(weight.shape[1] - 1, -1, -1):
            group = levels.groups[j]
            low, step = levels.low[row, group], levels.step[row, group]
            code = _nearest(target[row, j] - low, step, levels.first, levels.last, between)
            level = own[int(code)] if own.size else code
            error = weight[row, j] - (low + level * step)
            codes[row, j] = np.int8(code)
            errors[row, j] = error
            for i in range(j):
                target[row, i] += error * factor[j, i]


@compiled
def _nearest(
    value: np.float32, step: np.float32, first: np.float32, last: np.float32, between: Vector
) -> np.float32:
    """The code whose level times `step` is nearest to `value`; the first where all are equal."""
    if step == 0:
        return first
    wanted = value / step
    if between.size:
        return np.float32(np.searchsorted(between, wanted))
    code = np.rint(wanted)
    code = first if code < first else code
    return last if code > last else code


def _unusable(why: str) -> BadInput:
    return BadInput(
        "the Hessian of a weight is unusable", why, "calibrate on another text, or use --method rtn"
    )
