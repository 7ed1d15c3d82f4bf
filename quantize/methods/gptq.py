"""GPTQ: choose codes one input column at a time, later columns making up for earlier errors.

Frantar et al. 2022 (arXiv:2210.17323), with scales fixed up front (static groups) and columns in
the order of their importance (act-order). Written as feedback through the factor H = L D L^T,
which chooses the same codes without inverting H (Chee et al. 2023, arXiv:2307.13304, theorem 6).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BadInput
from ..compiled import compiled
from ..grid import Float32, Grid, Int8
from ..tensor import QuantizedTensor
from . import rtn

_DAMPINGS = (0.01, 0.1, 1.0)  # of the mean diagonal; the next one only if the factor fails
_GIVEN_BACK = np.float32(0.5)  # of the drift; all of it fits the calibration text too closely
_BLOCK = 128  # columns between two updates by matrix product

Indices = npt.NDArray[np.int64]


def solve(
    weight: Float32, grid: Grid, hessian: Float32, drift: Float32 | None = None
) -> QuantizedTensor:
    """Quantize so that the outputs, not the weights, change least.

    Args:
        weight: float32 (rows, columns), finite.
        grid: its scales are those of RTN's search.
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
    importance = hessian.diagonal()
    if not np.isfinite(importance).all():
        raise _unusable("its diagonal is not finite")
    order = np.argsort(importance, kind="stable")
    order = order[importance[order] > 0]
    if order.size == 0:
        return rtn.solve(weight, grid)
    factor = _factor(hessian, order)
    if drift is not None:
        weight = weight.copy()
        weight[:, order] += _correction(drift, order, factor)
    rounded = rtn.solve(weight, grid)
    factor /= factor.diagonal()[:, None].clone()
    rounded.codes[:, order] = _feedback(weight, rounded.scale, grid, order, factor.mT)
    return rounded


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


def _feedback(weight: Float32, scale: Float32, grid: Grid, order: Indices, factor: Tensor) -> Int8:
    """Codes (rows, len(order)) of the columns `order`, chosen from the last to the first.

    Column j is rounded after adding sum(error[i] * factor[i, j]) over the columns i > j, whose
    error is weight - code * scale; `factor` is unit lower triangular.
    """
    weight = weight[:, order]
    groups = order // grid.group if grid.group else np.zeros_like(order)
    codes = np.empty(weight.shape, np.int8)
    errors = torch.empty(weight.shape)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for stop in range(order.size, 0, -_BLOCK):
            block = slice(max(0, stop - _BLOCK), stop)
            target = torch.from_numpy(weight[:, block].copy())
            target.addmm_(errors[:, stop:], factor[stop:, block])
            choose = partial(
                _choose,
                weight[:, block],
                target.numpy(),
                scale,
                groups[block],
                factor[block, block].contiguous().numpy(),
                (np.float32(grid.low), np.float32(grid.high)),
                codes[:, block],
                errors[:, block].numpy(),
            )
            list(pool.map(choose, *_parts(len(weight))))
    return codes


def _parts(rows: int) -> tuple[list[int], list[int]]:
    """First rows and last rows + 1, one part for every thread."""
    edges = np.linspace(0, rows, torch.get_num_threads() + 1).astype(int).tolist()
    return edges[:-1], edges[1:]


@compiled
def _choose(
    weight: Float32,
    target: Float32,
    scale: Float32,
    groups: Indices,
    factor: Float32,
    limits: tuple[np.float32, np.float32],
    codes: Int8,
    errors: Float32,
    start: int,
    stop: int,
) -> None:
    """Codes and errors of rows start .. stop - 1 in one block of columns, last column first."""
    low, high = limits
    for row in range(start, stop):
        for j in range(weight.shape[1] - 1, -1, -1):
            step = scale[row, groups[j]]
            code = np.rint(target[row, j] / step)
            code = low if code < low else code
            code = high if code > high else code
            error = weight[row, j] - code * step
            codes[row, j] = np.int8(code)
            errors[row, j] = error
            for i in range(j):
                target[row, i] += error * factor[j, i]


def _unusable(why: str) -> BadInput:
    return BadInput(
        "the Hessian of a weight is unusable", why, "calibrate on another text, or use --method rtn"
    )
