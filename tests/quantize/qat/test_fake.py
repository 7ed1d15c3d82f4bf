"""What trains is what ships: fake-quantized weights against QuantizedTensor and rtn's encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimport.quantize import grid as grids
from slimport.quantize.grid import GRIDS, Grid
from slimport.quantize.methods import rtn
from slimport.quantize.qat.fake import FakeQuantized, round_scale
from slimport.quantize.tensor import QuantizedTensor

LEARNED = [grid for grid in GRIDS.values() if grid.levels is None]


@pytest.fixture(params=LEARNED, ids=lambda grid: grid.name)
def grid(request: pytest.FixtureRequest) -> Grid:
    found: Grid = request.param
    return found


def made(grid: Grid, seed: int = 0) -> tuple[np.ndarray, QuantizedTensor]:
    """A weight of two rows of groups, one group of it zeros, and its RTN."""
    weight = np.random.default_rng(seed).normal(0, 0.05, (16, 512)).astype(np.float32)
    weight[3, :256] = 0
    return weight, rtn.solve(weight, grid)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_scales_are_rounded_to_the_same_bits() -> None:
    generator = np.random.default_rng(1)
    scale = generator.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    scale = scale[np.isfinite(scale) & (np.abs(scale) < 1e38)]
    halves = (generator.integers(0, 2**16, 1000, np.uint32) << 16 | 0x8000).view(np.float32)
    halves = halves[np.isfinite(halves) & (np.abs(halves) < 1e38)]  # ties between two scales
    edges = np.array([0.0, -0.0, 2**-17, 2**-18, -(2**-30), 65280, 65281, -1e30], np.float32)
    for values in (scale, halves, edges):
        found = round_scale(torch.from_numpy(values.copy())).numpy()
        assert same_bits(found, grids.round_scale(values))


def test_before_the_first_step_it_is_the_start(grid: Grid) -> None:
    _, start = made(grid)
    found = FakeQuantized(start).quantized()
    assert same_bits(found.scale, start.scale)
    assert same_bits(found.codes, start.codes)


def test_what_trains_is_what_ships(grid: Grid) -> None:
    """After steps of an optimizer too: the forward pass and the shipped codes are the same bits."""
    _, start = made(grid, 2)
    module = FakeQuantized(start)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3)
    aim = torch.from_numpy(made(grid, 3)[0])
    for _ in range(4):
        values = module()
        shipped = module.quantized()
        assert same_bits(values.detach().numpy(), shipped.dequantize())
        assert same_bits(shipped.scale, grids.round_scale(shipped.scale))
        latent = (module.latent * module.unit).detach().numpy()
        assert same_bits(shipped.codes, rtn.encode(latent, shipped.scale, grid))
        assert shipped.codes.min() >= grid.low and shipped.codes.max() <= grid.high
        optimizer.zero_grad()
        (values - aim).square().sum().backward()
        optimizer.step()
    assert not same_bits(shipped.codes, start.codes)


def test_ties_go_to_even_codes_as_they_do_in_rtn(grid: Grid) -> None:
    """Weights exactly between two codes, and exactly at the ends of the range."""
    steps = np.arange(grid.low - 1, grid.high + 2, 0.5, dtype=np.float32)
    size = grid.group or 512
    row = np.resize(steps, (1, max(512, -(-len(steps) // size) * size)))
    for step in (1.0, 0.0390625, 2.0**-17):
        weight = (row * np.float32(step)).astype(np.float32)
        scale = np.full((1, grid.groups(row.shape[1])), step, np.float32)
        start = QuantizedTensor(grid, rtn.encode(weight, scale, grid), scale)
        module = FakeQuantized(start)
        with torch.no_grad():
            module.latent.copy_(torch.from_numpy(weight) / module.unit)
        shipped = module.quantized()
        assert same_bits(shipped.codes, start.codes)
        assert same_bits(module().detach().numpy(), shipped.dequantize())
        # Even ones of the two neighbours: 0.5 is 0, 1.5 is 2.
        half = row[0] % 1 == 0.5
        inside = half & (row[0] > grid.low) & (row[0] < grid.high)
        assert (shipped.codes[0, inside] % 2 == 0).all()


def test_gradients_are_those_of_lsq() -> None:
    """By hand, scale 0.5 and codes -1 to 2: weight 0.6 is 1.2 steps, code 1; 2.0 is clipped."""
    weight = np.zeros((1, 64), np.float32)
    weight[0, :3] = 0.6, 2.0, -1.0
    scale = np.array([[0.5]], np.float32)
    grid = grids.INT2_G64
    module = FakeQuantized(QuantizedTensor(grid, rtn.encode(weight, scale, grid), scale))
    assert module.unit == 0.5
    with torch.no_grad():
        module.latent.copy_(torch.from_numpy(weight) / module.unit)
    module().sum().backward()
    assert module.latent.grad is not None and module.factor.grad is not None
    assert module.latent.grad[0, :4].tolist() == [0.5, 0.0, 0.0, 0.5]  # times the unit
    # d/ds: 1 - 1.2 inside; 2 and -1 where it is clipped; times the first scale.
    assert module.factor.grad.item() == pytest.approx(0.5 * ((1 - 1.2) + 2 - 1), rel=1e-6)


def test_a_scale_keeps_its_sign_and_its_limits() -> None:
    _, start = made(grids.INT4_G32_SIGNED)
    module = FakeQuantized(start)
    assert (start.scale < 0).any()
    with torch.no_grad():
        module.factor.fill_(-3.0)
    shrunk = module.quantized().scale
    assert same_bits(np.sign(shrunk), np.sign(start.scale))
    assert (np.abs(shrunk) == grids.SCALE_FLOOR).all()
