"""Statistics of calibration against those of transformers' own inputs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from slimport.architectures import FAMILIES, DecoderConfig, decoder_config, weights
from slimport.checkpoint import Checkpoint
from slimport.errors import EnvironmentFailed
from slimport.quantize import calibration
from slimport.quantize.calibration import Statistics, layer_statistics
from slimport.quantize.grid import INT4_G32, Float32
from slimport.quantize.methods import rtn
from slimport.quantize.windows import Windows, windows_of


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
) -> dict[str, Statistics]:
    """All statistics, every layer rounded to int4-g32 before the next one if `quantize`."""
    layers = layer_statistics(source, config, windows)
    passage, found = next(layers)
    everything = dict(found)
    for expected in range(1, config.layers):
        assert passage.index == expected - 1
        passage, found = layers.send(rounded(source, found) if quantize else {})
        everything |= found
    with pytest.raises(StopIteration):
        layers.send({})
    return everything


def module_inputs(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], windows: Windows
) -> dict[str, torch.Tensor]:
    """What each module receives: float64 (tokens, inputs)."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1).double()})
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(torch.from_numpy(windows.ids).long())
    for hook in hooks:
        hook.remove()
    return inputs


def layer_linears(model: torch.nn.Module, layer: int) -> dict[str, torch.nn.Linear]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f".layers.{layer}." in name
    }


def layer_norms(model: torch.nn.Module, layer: int) -> dict[str, torch.nn.Module]:
    """The norms that read what o_proj and down_proj are added to, under the names of these.

    None where another norm stands between the Linear and the addition.
    """
    norms = model.model.layers[layer]
    if hasattr(norms, "post_feedforward_layernorm"):
        return {}
    return {"o_proj": norms.input_layernorm, "down_proj": norms.post_attention_layernorm}


def expected_statistics(folder: Path, windows: Windows, quantize: bool) -> dict[str, Statistics]:
    """From transformers, in float64: the layers before each one rounded, itself as it is."""
    exact, actual = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2)
    )
    found: dict[str, Statistics] = {}
    for index in range(len(exact.model.layers)):
        wanted, got = (
            module_inputs(model, layer_linears(model, index) | layer_norms(model, index), windows)
            for model in (exact, actual)
        )
        for name, linear in layer_linears(actual, index).items():
            missing = (wanted[name] - got[name]) @ linear.weight.detach().double().T
            for added, norm_input in wanted.items():
                if f".{added}." in name:
                    multiplier = getattr(exact.config, "residual_multiplier", 1)
                    missing += (norm_input - got[added]) / multiplier
            tokens = len(missing)
            hessian, drift = got[name].T @ got[name] / tokens, missing.T @ got[name] / tokens
            found[name] = Statistics(hessian.float().numpy(), drift.float().numpy())
        if quantize:
            for linear in layer_linears(actual, index).values():
                values = rtn.solve(linear.weight.detach().numpy(), INT4_G32).dequantize()
                linear.weight.data = torch.from_numpy(values)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_transformers(family: str, make_model: Any) -> None:
    folder = make_model(family, num_hidden_layers=3)
    source, windows = Checkpoint.open(folder), random_windows()
    config = decoder_config(source.config)
    actual = stream(source, config, windows, quantize=True)
    expected = expected_statistics(folder, windows, quantize=True)
    assert set(actual) == {weight.name for weight in weights(config) if weight.is_linear}
    for name, (hessian, drift) in expected.items():
        assert actual[name].hessian.dtype == actual[name].drift.dtype == np.float32
        assert np.abs(actual[name].hessian - hessian).max() < 1e-5 * np.abs(hessian).max(), name
        assert np.abs(actual[name].drift - drift).max() <= 1e-4 * np.abs(drift).max(), name


def test_nothing_drifts_before_something_is_quantized(tiny_llama: Path) -> None:
    source, windows = Checkpoint.open(tiny_llama), random_windows(8)
    config = decoder_config(source.config)
    full, quantized = (stream(source, config, windows, flag) for flag in (False, True))
    for name in full:
        first = ".layers.0." in name
        assert not full[name].drift.any()
        assert quantized[name].drift.any() != first
        assert np.array_equal(full[name].hessian, quantized[name].hessian) == first


def test_a_layer_is_let_go_before_the_next(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    layers = layer_statistics(source, decoder_config(source.config), random_windows(2))
    _, found = next(layers)
    hessian = weakref.ref(next(iter(found.values())).hessian)
    layers.send({})
    assert not found and hessian() is None


def test_linears_with_one_input_share_a_hessian(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    _, found = next(layer_statistics(source, decoder_config(source.config), random_windows(2)))
    arrays = {name.split(".")[-2]: statistics.hessian for name, statistics in found.items()}
    assert arrays["q_proj"] is arrays["k_proj"] is arrays["v_proj"]
    assert arrays["gate_proj"] is arrays["up_proj"]
    assert len({id(array) for array in arrays.values()}) == 4


def test_activations_past_the_limit_lie_in_files_and_are_the_same_bytes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, windows = Checkpoint.open(tiny_llama), random_windows()
    config = decoder_config(source.config)
    files, make = [], calibration.tempfile.TemporaryFile
    monkeypatch.setattr(
        calibration.tempfile,
        "TemporaryFile",
        lambda buffering: files.append(1) or make(buffering=0),
    )
    needed = 2 * 4 * windows.ids.size * config.hidden_size  # both streams, float32
    assert needed < calibration.IN_MEMORY == 256 * 2**20
    found = []
    for limit, count in ((needed, 0), (needed - 1, 2)):
        monkeypatch.setattr(calibration, "IN_MEMORY", limit)
        files.clear()
        found.append(stream(source, config, windows, quantize=True))
        assert len(files) == count
    for name, statistics in found[0].items():
        for one, other in zip(statistics, found[1][name], strict=True):
            assert one.tobytes() == other.tobytes(), name


def test_finished_layers_are_passed_through(tiny_qwen3: Path) -> None:
    """What follows them is what it was when they were calibrated, to the bit."""
    source, windows = Checkpoint.open(tiny_qwen3), random_windows()
    config = decoder_config(source.config)
    whole = stream(source, config, windows, quantize=True)
    names = [weight.name for weight in weights(config) if weight.layer == 0 and weight.is_linear]
    before = [lambda: rounded(source, dict.fromkeys(names))]
    layers = layer_statistics(source, config, windows, before=before)
    passage, found = next(layers)
    assert passage.index == 1
    for name, statistics in found.items():
        for one, other in zip(statistics, whole[name], strict=True):
            assert one.tobytes() == other.tobytes(), name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_with_its_size(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w+b", buffering=0)
    monkeypatch.setattr(calibration.tempfile, "TemporaryFile", lambda buffering: full)
    monkeypatch.setattr(calibration, "IN_MEMORY", 0)
    source = Checkpoint.open(tiny_llama)
    with pytest.raises(EnvironmentFailed, match="temporary disk space"):
        next(layer_statistics(source, decoder_config(source.config), random_windows(2)))
