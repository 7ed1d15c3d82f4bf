"""Grids with zero points: what rounding gives, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.quantize.grid import GRIDS, Float32, Grid, round_scale
from slimport.quantize.methods import gptq, rtn
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.tensor import QuantizedTensor

every_grid = pytest.mark.parametrize("name", ["uint4-g16", "uint4-g128", "uint4-row"])
GATE = "model.layers.0.mlp.gate_proj.weight"


def skewed(rows: int = 40, columns: int = 256) -> Float32:
    """Weights whose groups lie beside 0."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns)) + random.choice([-1.5, 0, 1.5], (rows, 1))
    return weight.astype(np.float32)


def squared(weight: Float32, tensor: QuantizedTensor) -> float:
    return float(((tensor.dequantize() - weight) ** 2).sum())


def naive(weight: Float32, grid: Grid) -> float:
    """The least squared error of every zero point and many scales."""
    rows = weight.shape[0]
    groups = weight.reshape(rows * grid.groups(weight.shape[1]), -1)
    least = np.full(len(groups), np.inf)
    width = groups.max(1, initial=0) - groups.min(1, initial=0)
    for share in np.linspace(0.7, 1.05, 71):
        scale = round_scale((width * share / 15).astype(np.float32))[:, None]
        for zero in range(16):
            codes = np.clip(np.rint(groups / scale), -zero, 15 - zero)
            least = np.minimum(least, ((codes * scale - groups) ** 2).sum(1))
    return float(least.sum())


@every_grid
def test_the_search_is_near_the_best(name: str) -> None:
    weight, grid = skewed(), GRIDS[name]
    tensor = rtn.solve(weight, grid)
    tensor.from_zero()  # every group fits
    np.testing.assert_array_equal(tensor.scale, round_scale(tensor.scale))
    ratio = squared(weight, tensor) / naive(weight, grid)
    assert 0.99 < ratio < 1.05
    assert squared(weight, tensor) < squared(weight, rtn.solve(weight, grid, search=False))


def test_zero_points_gain_where_weights_lie_beside_zero() -> None:
    weight = skewed()
    symmetric = squared(weight, rtn.solve(weight, GRIDS["int4-g32"]))
    assert squared(weight, rtn.solve(weight, GRIDS["uint4-g32"])) < 0.6 * symmetric


@every_grid
def test_gptq_keeps_to_the_windows_and_gains(name: str) -> None:
    weight, grid = skewed(), GRIDS[name]
    random = np.random.default_rng(1)
    inputs = random.standard_normal((2000, 256)) @ random.standard_normal((256, 256))
    hessian = (inputs.T @ inputs / 2000).astype(np.float32)

    def error(tensor: QuantizedTensor) -> float:
        missed = (tensor.dequantize() - weight).astype(np.float64)
        return float(np.einsum("ij,jk,ik->", missed, hessian, missed))

    rounded, tensor = rtn.solve(weight, grid), gptq.solve(weight, grid, hessian)
    assert isinstance(tensor, QuantizedTensor)
    tensor.from_zero()
    assert error(tensor) < 0.7 * error(rounded)


def test_zeros_stay_zeros() -> None:
    tensor = rtn.solve(np.zeros((2, 32), np.float32), GRIDS["uint4-g16"])
    assert not tensor.codes.any() and (tensor.scale == 1).all()


def test_a_checkpoint_keeps_codes_and_zero_points(tiny_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_llama)
    plan = make_plan(decoder_config(base.config), method="rtn", patterns={GATE: "uint4-g16"})
    model = quantize(
        base,
        base.config,
        plan,
        tmp_path / "out",
        calibration=None,
        tokenizer_folder=tiny_llama,
        progress=lambda stage, done, total: None,
    )
    tensor, loaded = rtn.solve(base.rows(GATE), GRIDS["uint4-g16"]), model.load(GATE)
    assert isinstance(loaded, QuantizedTensor)
    np.testing.assert_array_equal(loaded.codes, tensor.codes)
    np.testing.assert_array_equal(loaded.scale, tensor.scale)
    np.testing.assert_array_equal(model.rows(GATE, 3, 9), tensor.dequantize()[3:9])
    model.verify()
    stored = load_file(model.files[GATE])
    counted, zero_points = tensor.from_zero()
    packed = stored[f"{GATE}.codes"], stored[f"{GATE}.zero_point"]
    assert packed[0].shape == (96, 32) and packed[1].shape == (96, 2)
    for found, wanted in zip(packed, (counted, zero_points), strict=True):
        np.testing.assert_array_equal(found, (wanted[:, ::2] | wanted[:, 1::2] << 4).view(np.uint8))
