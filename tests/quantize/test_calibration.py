"""Hessians against those of transformers' own inputs, and the memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from slimport.architectures import DecoderConfig, decoder_config, weights
from slimport.checkpoint import Checkpoint
from slimport.errors import EnvironmentFailed
from slimport.quantize import calibration
from slimport.quantize.calibration import layer_hessians
from slimport.quantize.grid import INT4_G32, Float32
from slimport.quantize.methods import rtn
from slimport.quantize.windows import Windows, windows_of

FAMILY = ["llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of windows, the last one shorter than the others."""
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 300)


def random_windows(count: int = 25, length: int = 32) -> Windows:
    ids = np.random.default_rng(0).integers(0, 416, (count, length))
    return windows_of(ids.astype(np.int32))


def rounded(source: Checkpoint, names: Mapping[str, object]) -> dict[str, Float32]:
    return {name: rtn.solve(source.rows(name), INT4_G32).dequantize() for name in names}


def stream(
    source: Checkpoint, config: DecoderConfig, windows: Windows, quantize: bool
) -> dict[str, Float32]:
    """All Hessians, every layer rounded to int4-g32 before the next one if `quantize`."""
    hessians = layer_hessians(source, config, windows)
    index, found = next(hessians)
    everything = dict(found)
    for expected in range(1, config.layers):
        assert index == expected - 1
        index, found = hessians.send(rounded(source, found) if quantize else {})
        everything |= found
    with pytest.raises(StopIteration):
        hessians.send({})
    return everything


def linear_inputs(
    model: torch.nn.Module, linears: Mapping[str, torch.nn.Module], windows: Windows
) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        model(torch.from_numpy(windows.ids).long())
    for hook in hooks:
        hook.remove()
    return inputs


def expected_hessians(folder: Path, windows: Windows, quantize: bool) -> dict[str, Float32]:
    """From transformers, layer by layer: those before it rounded, itself in full precision."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found: dict[str, Float32] = {}
    for index in range(len(model.model.layers)):
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and f".layers.{index}." in name
        }
        for name, inputs in linear_inputs(model, linears, windows).items():
            flat = inputs.flatten(0, 1).double()
            found[f"{name}.weight"] = (flat.T @ flat / len(flat)).float().numpy()
        if quantize:
            for module in linears.values():
                values = rtn.solve(module.weight.detach().numpy(), INT4_G32).dequantize()
                module.weight.data = torch.from_numpy(values)
    return found


@pytest.mark.parametrize("quantize", [False, True], ids=["full", "rounded"])
@pytest.mark.parametrize("family", FAMILY)
def test_hessians_are_those_of_transformers(
    family: str, quantize: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    source, windows = Checkpoint.open(folder), random_windows()
    config = decoder_config(source.config)
    actual = stream(source, config, windows, quantize)
    expected = expected_hessians(folder, windows, quantize)
    assert set(actual) == {weight.name for weight in weights(config) if weight.is_linear}
    for name, hessian in expected.items():
        assert actual[name].dtype == np.float32
        error = np.abs(actual[name] - hessian).max() / np.abs(hessian).max()
        assert error < 1e-5, name


def test_rounded_layers_change_later_hessians_only(tiny_llama: Path) -> None:
    source, windows = Checkpoint.open(tiny_llama), random_windows(8)
    config = decoder_config(source.config)
    full, quantized = (stream(source, config, windows, flag) for flag in (False, True))
    for name in full:
        assert np.array_equal(full[name], quantized[name]) == (".layers.0." in name)


def test_linears_with_one_input_share_a_hessian(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    _, found = next(layer_hessians(source, decoder_config(source.config), random_windows(2)))
    arrays = {name.split(".")[-2]: array for name, array in found.items()}
    assert arrays["q_proj"] is arrays["k_proj"] is arrays["v_proj"]
    assert arrays["gate_proj"] is arrays["up_proj"]
    assert len({id(array) for array in arrays.values()}) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_with_its_size(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w+b", buffering=0)
    monkeypatch.setattr(calibration.tempfile, "TemporaryFile", lambda buffering: full)
    source = Checkpoint.open(tiny_llama)
    with pytest.raises(EnvironmentFailed, match="temporary disk space"):
        next(layer_hessians(source, decoder_config(source.config), random_windows(2)))
