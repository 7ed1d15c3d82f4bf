"""GPTQ against the textbook algorithm, and what it promises beyond it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from slimport.errors import BadInput
from slimport.quantize import blocks
from slimport.quantize.blocks import BlockGrid, BlockTensor, Quantized
from slimport.quantize.codes import CODES
from slimport.quantize.ggml import Type
from slimport.quantize.grid import GRIDS, INT4_G32, INT8_G32, INT8_ROW, Float32, Grid, round_scale
from slimport.quantize.methods import gptq, kmeans, kquants, rtn
from slimport.quantize.palette import PALETTE_GRIDS, PaletteGrid, PaletteTensor
from slimport.quantize.recode import low_and_step

Float64 = npt.NDArray[np.float64]


PALETTES = pytest.mark.parametrize("grid", PALETTE_GRIDS.values(), ids=PALETTE_GRIDS)
STEPS = {
    name: GRIDS[name]
    for name in ("int4-g32", "int4-g32-signed", "int8-row", "int8-g32", "int2-g64", "int2-g256")
} | {name: GRIDS[name] for name in ("int4-g64", "int4-row-f16", "int3-g64")}


def width(grid: Grid, columns: int) -> int:
    """At least so many columns, in whole groups."""
    return columns if grid.group is None else -(-columns // grid.group) * grid.group


def problem(rows: int, columns: int, seed: int = 0, samples: int = 3000) -> tuple[Float32, Float32]:
    """A random weight, and the Hessian of correlated inputs of very different strength."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns))
    inputs = mixed * np.exp(rng.normal(size=columns))
    weight = rng.normal(size=(rows, columns)) * 0.1
    return weight.astype(np.float32), (inputs.T @ inputs / samples).astype(np.float32)


def output_error(quantized: Quantized, weight: Float32, hessian: Float32) -> float:
    difference = (quantized.dequantize() - weight).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", difference, hessian.astype(np.float64), difference))


def textbook(weight: Float32, levels: Float64, hessian: Float32) -> npt.NDArray[np.int64]:
    """Algorithm 1 of arXiv:2210.17323 in float64, one column at a time, the largest first.

    `levels` (rows, columns, codes) are the values that each weight may have; which it gets is
    returned.
    """
    order = np.argsort(hessian.diagonal(), kind="stable")[::-1]
    ordered = hessian[np.ix_(order, order)].astype(np.float64)
    ordered[np.diag_indices_from(ordered)] += 0.01 * ordered.diagonal().mean()
    inverse = np.linalg.cholesky(np.linalg.inv(ordered)).T
    left = weight[:, order].astype(np.float64)
    chosen = np.empty(weight.shape, np.int64)
    for column, source in enumerate(order):
        every = levels[:, source]
        chosen[:, source] = np.abs(every - left[:, column, None]).argmin(1)
        value = np.take_along_axis(every, chosen[:, source, None], 1)[:, 0]
        error = (left[:, column] - value) / inverse[column, column]
        left[:, column:] -= error[:, None] * inverse[column, column:]
    return chosen


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_codes_are_those_of_the_textbook(grid: Grid) -> None:
    weight, hessian = problem(48, width(grid, 320))
    quantized = gptq.solve(weight, grid, hessian)
    step = np.repeat(quantized.scale.astype(np.float64), grid.group or weight.shape[1], 1)
    levels = step[..., None] * np.arange(grid.low, grid.high + 1)
    expected = textbook(weight, levels, hessian) + grid.low
    assert (quantized.codes == expected).mean() > 0.999


@PALETTES
def test_codes_of_palettes_are_those_of_the_textbook(grid: PaletteGrid) -> None:
    weight, hessian = problem(48, 320)
    quantized = gptq.solve(weight, grid, hessian)
    assert isinstance(quantized, PaletteTensor)
    levels = np.repeat(quantized.levels.astype(np.float64), 16, 0)[:, None]
    expected = textbook(weight, np.broadcast_to(levels, (48, 320, grid.size)), hessian)
    assert (quantized.codes == expected).mean() > 0.999


@PALETTES
def test_outputs_change_less_than_with_kmeans(grid: PaletteGrid) -> None:
    weight, hessian = problem(48, 320)
    quantized = gptq.solve(weight, grid, hessian)
    alone = kmeans.solve(weight, grid, hessian.diagonal())
    assert isinstance(quantized, PaletteTensor)
    np.testing.assert_array_equal(quantized.levels, alone.levels)
    found = output_error(quantized, weight, hessian)
    assert found < 0.5 * output_error(alone, weight, hessian)
    assert found < 0.5 * output_error(kmeans.solve(weight, grid), weight, hessian)


@PALETTES
def test_dead_columns_of_palettes_keep_their_nearest_levels(grid: PaletteGrid) -> None:
    weight, hessian = problem(32, 160)
    dead = np.array([0, 31, 100, 159])
    hessian[dead] = hessian[:, dead] = 0
    quantized = gptq.solve(weight, grid, hessian)
    assert isinstance(quantized, PaletteTensor)
    expected = kmeans.encode(weight, quantized.levels)
    np.testing.assert_array_equal(quantized.codes[:, dead], expected[:, dead])
    assert (quantized.codes != expected).any()
    nothing = gptq.solve(weight, grid, np.zeros_like(hessian))
    assert nothing.digest("w") == kmeans.solve(weight, grid).digest("w")


@PALETTES
@pytest.mark.parametrize("rows", [16, 32, 112])
def test_threads_do_not_change_palettes(grid: PaletteGrid, rows: int) -> None:
    weight, hessian = problem(rows, 96)
    weight[:16] = 0
    before, digests = torch.get_num_threads(), set()
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        quantized = gptq.solve(weight, grid, hessian)
        digests.add(quantized.digest("w"))
        assert not quantized.dequantize()[:16].any()
    torch.set_num_threads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_outputs_change_less_than_with_rtn(grid: Grid) -> None:
    weight, hessian = problem(48, width(grid, 320))
    error = output_error(gptq.solve(weight, grid, hessian), weight, hessian)
    assert error < 0.5 * output_error(rtn.solve(weight, grid), weight, hessian)


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_scales_are_kept_to_eight_bits_and_codes_to_the_grid(grid: Grid) -> None:
    weight, hessian = problem(16, width(grid, 96))
    quantized = gptq.solve(weight * 3, grid, hessian)
    np.testing.assert_array_equal(quantized.scale, round_scale(quantized.scale))
    assert grid.low <= quantized.codes.min() and quantized.codes.max() <= grid.high
    if not grid.signed_scale:
        assert (quantized.scale > 0).all()


def test_dead_columns_keep_their_rtn_codes() -> None:
    weight, hessian = problem(16, 160)
    dead = np.array([0, 31, 32, 100, 159])
    hessian[dead] = hessian[:, dead] = 0
    quantized = gptq.solve(weight, INT4_G32, hessian)
    expected = rtn.encode(weight, quantized.scale, INT4_G32)
    np.testing.assert_array_equal(quantized.codes[:, dead], expected[:, dead])
    alive = np.setdiff1d(np.arange(160), dead)
    assert (quantized.codes[:, alive] != expected[:, alive]).any()


def test_drift_is_half_given_back() -> None:
    weight, hessian = problem(16, 96)
    lost = 0.05 * np.random.default_rng(3).normal(size=weight.shape).astype(np.float32)
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(96, dtype=np.float32)
    corrected = gptq.solve(weight, INT8_G32, hessian, lost @ damped)
    expected = gptq.solve(weight + lost / 2, INT8_G32, hessian)
    assert (corrected.codes == expected.codes).mean() > 0.93  # the rest is float32 rounding
    assert (corrected.codes == gptq.solve(weight, INT8_G32, hessian).codes).mean() < 0.5


def test_inputs_never_seen_give_rtn() -> None:
    weight, _ = problem(8, 64)
    quantized = gptq.solve(weight, INT4_G32, np.zeros((64, 64), np.float32))
    np.testing.assert_array_equal(quantized.codes, rtn.solve(weight, INT4_G32).codes)


def test_independent_inputs_give_the_nearest_codes() -> None:
    weight, _ = problem(8, 64)
    quantized = gptq.solve(weight, INT8_G32, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(quantized.codes, rtn.encode(weight, quantized.scale, INT8_G32))


def test_zero_rows_stay_zero() -> None:
    weight, hessian = problem(8, 64)
    weight[3] = 0
    quantized = gptq.solve(weight, INT4_G32, hessian)
    assert not quantized.codes[3].any() and (quantized.scale[3] == 1).all()


def test_fewer_samples_than_columns() -> None:
    weight, hessian = problem(16, 160, samples=40)
    error = output_error(gptq.solve(weight, INT4_G32, hessian), weight, hessian)
    assert error < 0.5 * output_error(rtn.solve(weight, INT4_G32), weight, hessian)


def test_rows_are_independent() -> None:
    weight, hessian = problem(45, 320)
    whole = gptq.solve(weight, INT4_G32, hessian)
    order = np.random.default_rng(1).permutation(45)
    shuffled = gptq.solve(weight[order], INT4_G32, hessian)
    np.testing.assert_array_equal(shuffled.codes, whole.codes[order])
    np.testing.assert_array_equal(shuffled.scale, whole.scale[order])


def test_same_bytes_twice() -> None:
    weight, hessian = problem(33, 320)
    first, second = (gptq.solve(weight, INT4_G32, hessian) for _ in range(2))
    assert first.digest("w") == second.digest("w")


def test_arguments_are_left_alone() -> None:
    weight, hessian = problem(8, 64)
    copies = weight.copy(), hessian.copy()
    gptq.solve(weight, INT8_ROW, hessian)
    np.testing.assert_array_equal(weight, copies[0])
    np.testing.assert_array_equal(hessian, copies[1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda hessian: hessian[:32, :32], "shape"),
        (lambda hessian: hessian * np.float32("nan"), "not finite"),
        (lambda hessian: np.where(np.eye(64) > 0, 1, 50).astype(np.float32), "positive definite"),
    ],
)
def test_unusable_hessians_are_refused(change, why) -> None:  # type: ignore[no-untyped-def]
    weight, hessian = problem(8, 64)
    with pytest.raises(BadInput, match=why):
        gptq.solve(weight, INT4_G32, change(hessian))


BLOCKS = pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)


@BLOCKS
def test_blocks_change_outputs_less_than_ggml_does(kind: Type) -> None:
    weight, hessian = problem(24, 512)
    grid, importance = BlockGrid(kind), np.ascontiguousarray(hessian.diagonal())
    by_ggml = blocks.solve(weight, grid, importance)
    ours = gptq.solve(weight, grid, hessian)
    assert isinstance(ours, BlockTensor) and ours.blocks.shape == by_ggml.blocks.shape
    assert output_error(ours, weight, hessian) < 0.56 * output_error(by_ggml, weight, hessian)
    rounded = kquants.round_blocks(weight, grid, importance)
    for mine, theirs in zip(low_and_step(ours), low_and_step(rounded), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@BLOCKS
def test_codes_of_blocks_are_those_of_the_textbook(kind: Type) -> None:
    """Scales are those of rounding; codes are by Algorithm 1, with a type's levels for a grid."""
    weight, hessian = problem(12, 256)
    grid, known = BlockGrid(kind), CODES[kind]
    quantized = gptq.solve(weight, grid, hessian)
    low, step = (np.repeat(part, known.group, 1) for part in low_and_step(quantized))
    levels = low[..., None] + step[..., None] * known.levels.astype(np.float64)
    chosen = textbook(weight, levels, hessian)
    values = np.take_along_axis(levels, chosen[..., None], 2)[..., 0]
    assert np.isclose(quantized.dequantize(), values, atol=1e-5).mean() > 0.99


@BLOCKS
def test_a_dead_group_keeps_its_weights(kind: Type) -> None:
    weight, hessian = problem(8, 512)
    hessian[:256] = hessian[:, :256] = 0
    missed = np.square(gptq.solve(weight, BlockGrid(kind), hessian).dequantize() - weight)
    assert missed[:, :256].sum() < 0.1 * np.square(weight[:, :256]).sum()


@BLOCKS
def test_dead_columns_of_blocks_keep_their_rounded_codes(kind: Type) -> None:
    weight, hessian = problem(8, 256)
    dead = np.array([0, 31, 32, 200])
    hessian[dead] = hessian[:, dead] = 0
    grid, importance = BlockGrid(kind), np.ascontiguousarray(hessian.diagonal())
    rounded = kquants.round_blocks(weight, grid, importance).dequantize()
    ours = gptq.solve(weight, grid, hessian).dequantize()
    np.testing.assert_array_equal(ours[:, dead], rounded[:, dead])
    nothing = gptq.solve(weight, grid, np.zeros_like(hessian)).dequantize()
    np.testing.assert_array_equal(nothing, kquants.round_blocks(weight, grid).dequantize())
