"""Our rounding to k-quants, held to ggml's kernels: they read every byte, and err no less."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimport.checkpoint import Checkpoint
from slimport.quantize import blocks
from slimport.quantize.blocks import BlockGrid, Quantized
from slimport.quantize.codes import CODES
from slimport.quantize.ggml import Type
from slimport.quantize.grid import Float32
from slimport.quantize.methods import kquants
from slimport.quantize.recode import low_and_step
from slimport.quantize.subscales import LAYOUTS

MODELS = Path(__file__).parents[3] / "shared" / "models"
every_type = pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)


def normal(rows: int, columns: int, seed: int = 0) -> Float32:
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return values * np.float32(0.05)


def strengths(columns: int) -> Float32:
    return np.exp(2 * np.random.default_rng(9).standard_normal(columns, np.float32))


def error(weight: Float32, tensor: Quantized) -> float:
    return float(np.square(weight.astype(np.float64) - tensor.dequantize()).sum())


@every_type
def test_error_is_below_that_of_ggmls_kernel(kind: Type) -> None:
    weight, grid = normal(64, 1024), BlockGrid(kind)
    assert error(weight, kquants.solve(weight, grid)) < error(weight, blocks.solve(weight, grid))


@every_type
def test_inputs_that_matter_err_less_and_so_do_large_weights(kind: Type) -> None:
    weight, grid = normal(64, 1024), BlockGrid(kind)
    important, importance = slice(0, 1024, 7), np.ones(1024, np.float32)
    importance[important] = 100
    large = np.abs(weight) > 3 * weight.std()
    plain, alike, weighed = (
        np.square(kquants.solve(weight, grid, given).dequantize() - weight)
        for given in (None, np.ones(1024, np.float32), importance)
    )
    assert weighed[:, important].sum() < 0.9 * plain[:, important].sum()
    assert alike[large].sum() < plain[large].sum()


@every_type
def test_one_input_far_above_all_others_ruins_nothing(kind: Type) -> None:
    weight, grid = normal(64, 256), BlockGrid(kind)
    importance = np.ones(256, np.float32)
    importance[77] = 1e9
    weighed, plain = (
        np.square(kquants.solve(weight, grid, given).dequantize() - weight)
        for given in (importance, None)
    )
    assert weighed[:, 77].sum() < 0.1 * plain[:, 77].sum()
    assert weighed.sum() < 1.2 * plain.sum()


@every_type
def test_inputs_that_never_mattered(kind: Type) -> None:
    """They decide only where nothing else does."""
    weight, grid = normal(8, 512), BlockGrid(kind)
    importance = strengths(512)
    importance[[0, 3, 40]] = importance[256:272] = 0
    missed = np.square(kquants.solve(weight, grid, importance).dequantize() - weight)
    assert missed[:, 256:272].sum() < 0.3 * np.square(weight[:, 256:272]).sum()
    nothing = kquants.solve(weight, grid, np.zeros(512, np.float32))
    np.testing.assert_array_equal(nothing.blocks, kquants.solve(weight, grid).blocks)


@every_type
@pytest.mark.skipif(not (MODELS / "manpages-3.7M").is_dir(), reason="no shared models")
def test_error_on_trained_weights_is_below_that_of_ggmls_kernel(kind: Type) -> None:
    grid = BlockGrid(kind)
    trained = Checkpoint.open(MODELS / "manpages-3.7M")
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        weight = trained.rows(f"model.layers.2.{name}.weight")
        ours, theirs = kquants.solve(weight, grid), blocks.solve(weight, grid)
        assert error(weight, ours) < error(weight, theirs)


@every_type
def test_codes_are_the_nearest_under_the_scales_that_ggml_reads(kind: Type) -> None:
    weight, known = normal(16, 512), CODES[kind]
    tensor = kquants.solve(weight, BlockGrid(kind), strengths(512))
    low, step = (np.repeat(part, known.group, 1) for part in low_and_step(tensor))
    every = low[..., None] + step[..., None] * known.levels
    distance = np.abs(every - weight[..., None]).min(2)
    np.testing.assert_allclose(np.abs(tensor.dequantize() - weight), distance, atol=1e-6)


@every_type
def test_rows_are_independent(kind: Type) -> None:
    weight, grid = normal(37, 768), BlockGrid(kind)
    importance = strengths(768)
    whole = kquants.solve(weight, grid, importance).blocks
    order = np.random.default_rng(1).permutation(37)
    shuffled = kquants.solve(weight[order], grid, importance).blocks
    np.testing.assert_array_equal(shuffled, whole[order])
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda row: kquants.solve(row[None], grid, importance), weight)
        np.testing.assert_array_equal(np.concatenate([part.blocks for part in parts]), whole)


@every_type
def test_any_finite_block_is_held_as_well_as_by_ggml(kind: Type) -> None:
    grid = BlockGrid(kind)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        arrays(np.float32, (1, 256), elements=st.sampled_from([0, -1, 1, 0.1, -0.3, 7, -40])),
        st.sampled_from([1e-2, 1, 1e3]),
    )
    def holds(values: Float32, factor: float) -> None:
        weight = values * np.float32(factor)
        ours, theirs = (f(weight, grid) for f in (kquants.solve, blocks.solve))
        assert np.isfinite(ours.dequantize()).all()
        # A block of few values may suit either search better.
        assert error(weight, ours) <= 1.5 * error(weight, theirs) + 1e-3 * np.square(weight).sum()

    holds()


@every_type
def test_constant_blocks(kind: Type) -> None:
    for value in (0, 0.25, -0.25):
        weight = np.full((2, 256), value, np.float32)
        tensor = kquants.solve(weight, BlockGrid(kind))
        np.testing.assert_allclose(tensor.dequantize(), weight, atol=2e-3)
