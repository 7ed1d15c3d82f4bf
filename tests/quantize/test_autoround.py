"""Learned rounding: what is learnt is what ships, it starts at GPTQ's codes and keeps the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.quantize import calibration
from slimport.quantize.calibration import layer_statistics, same_threads
from slimport.quantize.grid import GRIDS, INT2_G64, Grid, round_scale
from slimport.quantize.methods import autoround, gptq
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.tensor import QuantizedTensor
from slimport.quantize.windows import Windows, windows_of

STEPS = {name: grid for name, grid in GRIDS.items() if grid.levels is None}
THREES = Grid("threes", bits=2, low=-1, high=1, group=32)
DOWN = {"*.down_proj.*": "int4-g32"}
UP = "model.layers.1.mlp.up_proj.weight"


def problem(grid: Grid, rows: int = 24, seed: int = 0) -> tuple[np.ndarray, QuantizedTensor]:
    """A weight of 512 columns and GPTQ's codes, many of them not the nearest."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(900, 512)) @ rng.normal(size=(512, 512))
    hessian = (inputs.T @ inputs / 900).astype(np.float32)
    weight = (rng.normal(size=(rows, 512)) * 0.1).astype(np.float32)
    weight[3] = 0
    return weight, gptq.solve(weight, grid, hessian)


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return windows_of(np.random.default_rng(0).integers(0, 400, (48, 64)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches of eight windows, of which one is held; 20 large steps."""
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 512)
    monkeypatch.setattr(autoround, "_STEPS", 20)
    monkeypatch.setattr(autoround, "_RATE", 0.03)


@pytest.fixture
def run(source: Checkpoint, windows: Windows, tmp_path: Path) -> Callable[..., QuantizedCheckpoint]:
    """2 bits, but in down projections, whose rows do not divide by 64."""

    def call(
        name: str,
        method: str = "autoround",
        preset: str = "int2",
        patterns: Mapping[str, str] = DOWN,
    ) -> QuantizedCheckpoint:
        return quantize(
            source,
            source.config,
            make_plan(decoder_config(source.config), preset, method, patterns),
            tmp_path / name,
            calibration=windows,
            tokenizer_folder=source.folder,
            progress=lambda *_: None,
        )

    return call


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_it_starts_at_the_codes_that_it_is_given(grid: Grid) -> None:
    weight, start = problem(grid)
    assert autoround._Linear(weight, start).tensor().digest("w") == start.digest("w")


@pytest.mark.parametrize("grid", STEPS.values(), ids=STEPS)
def test_what_is_learnt_is_what_ships_bit_for_bit(grid: Grid) -> None:
    weight, start = problem(grid)
    linear = autoround._Linear(weight, start)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        (linear.values() * torch.randn(start.shape, generator=generator)).sum().backward()
        linear.hold_zeros()
        with torch.no_grad():
            for learnt in (linear.offset, linear.factor):
                learnt -= 0.03 * learnt.grad.sign()
                learnt.grad = None
    found = linear.tensor()
    assert (found.codes != start.codes).mean() > 0.05
    assert (found.scale != start.scale).mean() > 0.5
    np.testing.assert_array_equal(found.scale, round_scale(found.scale))
    assert grid.low <= found.codes.min() and found.codes.max() <= grid.high
    np.testing.assert_array_equal(linear.values().detach().numpy(), found.dequantize())
    assert not found.codes[3].any() and (found.scale[3] == 1).all()  # an all-zero row


def test_gradients_by_hand() -> None:
    """Scale 1/2; codes 1 (of 0.4 + 0.3), -1 (clipped) and 2 (clipped), weights 0.2, -3 and 4."""
    weight = np.zeros((1, 64), np.float32)
    weight[0, :3] = 0.2, -3, 4
    codes = np.zeros((1, 64), np.int8)
    codes[0, :3] = 1, -1, 2
    start = QuantizedTensor(INT2_G64, codes, np.full((1, 1), 0.5, np.float32))
    linear = autoround._Linear(weight, start)
    gradient = torch.zeros(1, 64)
    gradient[0, :3] = torch.tensor([10.0, 100.0, 1000.0])
    linear.values().backward(gradient)
    assert linear.offset.grad is not None and linear.factor.grad is not None
    assert linear.offset.grad.flatten()[:4].tolist() == [5, 0, 0, 0]
    # d value / d factor = scale * (code - weight / scale) inside, scale * code where it is clipped
    expected = 0.5 * (10 * (1 - 0.4) + 100 * -1 + 1000 * 2)
    assert linear.factor.grad.item() == pytest.approx(expected)


def test_layers_give_more_of_what_they_give_in_full_precision(
    run: Callable[..., QuantizedCheckpoint],
) -> None:
    model = run("learnt")
    assert [*model.layers] == ["0", "1"]
    first, second = (told["learnt"] for told in model.layers.values())
    assert first["after"] < 0.95 * first["before"]  # inputs are noise
    assert second["after"] < second["before"]
    assert 0 < first["steps"] <= 20
    assert model.plan[UP].method == "autoround"


def test_the_record_is_of_the_codes_that_ship(
    run: Callable[..., QuantizedCheckpoint], source: Checkpoint, windows: Windows
) -> None:
    """The error of layer 0 again, from the checkpoint on disk and held windows."""
    model = run("learnt")
    with same_threads():
        stream = layer_statistics(source, model.decoder, windows, hold=True)
        passage, found = next(stream)
        assert passage.held == (3,) and passage.teaches == (0, 1, 2, 4, 5)
        weights = {name: torch.from_numpy(model.rows(name)) for name in found}
        given = passage.run(passage.inputs(3), passage.load(weights))
        wanted = passage.targets(3)
        errors = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert model.layers["0"]["learnt"]["after"] == pytest.approx(errors.mean().item(), rel=1e-5)


def test_where_learning_does_harm_gptq_codes_stay(
    run: Callable[..., QuantizedCheckpoint],
    source: Checkpoint,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autoround, "_RATE", 30.0)
    model = run("harmed", preset="int8")
    stream = layer_statistics(source, model.decoder, windows, hold=True)
    for index in range(2):
        with same_threads():
            _, seen = next(stream) if index == 0 else stream.send(solved)  # noqa: F821
            solved = {}
            for name, statistics in seen.items():
                grid = model.plan[name].grid
                expected = gptq.solve(source.rows(name), grid, *statistics)
                assert expected.digest(name) == model.records[name].digest
                solved[name] = expected.dequantize()
        told = model.layers[str(index)]["learnt"]
        assert told["steps"] == 0 and told["before"] == told["after"]


def test_two_runs_write_the_same_bytes(run: Callable[..., QuantizedCheckpoint]) -> None:
    first, second = run("a"), run("b")
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


def test_linears_on_other_grids_and_float_ones_stay(
    run: Callable[..., QuantizedCheckpoint],
) -> None:
    patterns = DOWN | {"*.gate_proj.*": "float16", "*.o_proj.*": "nf4-g64", "*.q_proj.*": "Q4_0"}
    mixed = run("mixed", patterns=patterns)
    methods = {c.weight.name.split(".")[-2]: c.method for c in mixed.plan.choices if c.grid}
    assert methods["o_proj"] == "rtn-absmax" and methods["q_proj"] == "gptq"
    assert methods["embed_tokens"] == "rtn" and methods["up_proj"] == "autoround"
    plain = run("plain", method="gptq", patterns=patterns)
    same = "model.layers.0.self_attn.o_proj.weight"
    assert mixed.records[same] == plain.records[same]
    assert mixed.layers["0"]["learnt"]["after"] < mixed.layers["0"]["learnt"]["before"]


def test_every_kind_of_layer_learns(
    make_model: Callable[..., Path], windows: Windows, tmp_path: Path
) -> None:
    """Fused weights with biases and soft caps: gradients reach every Linear."""
    for family in ("phi3", "qwen2", "gemma2"):
        source = Checkpoint.open(make_model(family))
        decoder = decoder_config(source.config)
        with same_threads():
            stream = layer_statistics(source, decoder, windows, hold=True)
            passage, seen = next(stream)
            values = {name: source.rows(name) for name in seen}
            start = {n: gptq.solve(values[n], THREES, *seen[n]) for n in seen}
            refined, told = autoround.refine(values, start, {}, passage)
        assert told.after < told.before
        changed = {n: (refined[n].codes != start[n].codes).any() for n in seen}
        assert all(changed.values()), changed
