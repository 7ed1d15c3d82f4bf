"""Half-quadratic scales: less of the error that they are for, on any grid, the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from slimport.quantize.grid import GRIDS, INT2_G64, INT4_G32, Float32, Grid, round_scale
from slimport.quantize.methods import hqq, rtn
from slimport.quantize.tensor import QuantizedTensor

STEPS = {name: grid for name, grid in GRIDS.items() if grid.levels is None and not grid.asymmetric}


def weight(rows: int = 96, columns: int = 512, seed: int = 0) -> Float32:
    """Heavy tails: some weights of a group are many times larger than the others."""
    return np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32) * 0.1


def errors(tensor: QuantizedTensor, values: Float32) -> Float32:
    """Sum |e|^(3/4) of each group, in steps of its rtn scale; float64."""
    missed = np.abs(tensor.dequantize().astype(np.float64) - values)
    unit = np.abs(rtn.find_scale(values, tensor.grid))[..., None]
    return ((missed.reshape(*unit.shape[:2], -1) / unit) ** 0.75).sum(-1)


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_the_error_that_it_is_for_falls(grid: Grid) -> None:
    values = weight()
    found, plain = (errors(solve(values, grid), values) for solve in (hqq.solve, rtn.solve))
    if grid.bits == 8:  # a scale is rounded after it was found, and that outweighs all else
        assert found.sum() < 1.01 * plain.sum()
    else:
        assert found.sum() < plain.sum() and (found < 1.02 * plain).all()


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_scales_and_codes_are_those_of_the_grid(grid: Grid) -> None:
    values = weight()
    values[5] = 0
    found = hqq.solve(values, grid)
    np.testing.assert_array_equal(found.scale, round_scale(found.scale))
    np.testing.assert_array_equal(found.codes, rtn.encode(values, found.scale, grid))
    assert (found.scale[5] == 1).all() and not found.codes[5].any()
    if not grid.signed_scale:
        assert (found.scale > 0).all()


def test_one_group_by_hand() -> None:
    """62 weights of 1 and two of 4, whose code is 2: least squares give 78 / 70."""
    values = np.ones((1, 64), np.float32)
    values[0, [7, 50]] = 4
    assert rtn.find_scale(values, INT2_G64)[0, 0] == pytest.approx(78 / 70, rel=1 / 256)
    found = hqq.solve(values, INT2_G64)
    assert 1 <= found.scale[0, 0] < 1.07  # a part of the two is an exception
    assert found.codes[0, :8].tolist() == [1] * 7 + [2]


def test_blocks_of_rows_and_powers_of_two_change_nothing() -> None:
    values = weight(rows=70)
    whole = hqq.solve(values, INT4_G32)
    parts = [hqq.solve(values[start : start + 9], INT4_G32) for start in range(0, 70, 9)]
    np.testing.assert_array_equal(np.concatenate([p.codes for p in parts]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([p.scale for p in parts]), whole.scale)
    halved = hqq.solve(values / 4, INT4_G32)
    np.testing.assert_array_equal(halved.codes, whole.codes)
    np.testing.assert_array_equal(halved.scale, whole.scale / 4)
