"""compressed-tensors, MLX and torchao, packed by hand; beside the libraries all were equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported
from slimport.quantize.blocks import BlockTensor
from slimport.quantize.given import Given, open_given

Q = "model.layers.0.self_attn.q_proj"
Run = Callable[..., Any]


def opened(folder: Path) -> Given:
    given = open_given(Checkpoint.open(folder))
    assert given is not None
    return given


def packed(numbers: Any, bits: int = 4) -> torch.Tensor:
    """int32 words along the last axis, low bits first."""
    each = 32 // bits
    words = sum(numbers[:, i::each].astype(np.int64) << (bits * i) for i in range(each))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def compressed(codes: Any, dtype: torch.dtype, asymmetric: bool) -> dict[str, torch.Tensor]:
    found = {
        "weight_packed": packed(codes.q),
        "weight_scale": torch.from_numpy(codes.scale).to(dtype),
        "weight_shape": torch.tensor(codes.q.shape),
    }
    if asymmetric:
        found["weight_zero_point"] = packed(codes.z.T).T.contiguous()
    return found


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path, rewritten: Any, round_to: Any) -> Callable[..., Any]:
    """made(form, config, group=32, symmetric=False) -> (folder, {source name: Codes})."""

    def make(
        form: Callable[[Any], Any],
        config: dict[str, Any],
        group: int = 32,
        symmetric: bool = False,
        coarse: bool = False,
    ) -> Any:
        known: dict[str, Any] = {}

        def tensors(name: str, weight: torch.Tensor) -> Any:
            codes = round_to(weight, group, 4, symmetric)
            if coarse:  # scales of 8 bits, as bfloat16 has them
                codes.scale[:] = torch.from_numpy(codes.scale).bfloat16().float().numpy()
            known[name] = codes
            return form(codes)

        return rewritten(tiny_llama, tmp_path / "model", tensors, config), known

    return make


def settings(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {"quantization_config": stated | {"config_groups": {"group_0": group}} | changes}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compressed_tensors(made: Any, asymmetric: bool, dtype: torch.dtype) -> None:
    coarse = dtype == torch.bfloat16
    folder, known = made(
        lambda codes: compressed(codes, dtype, asymmetric),
        settings(),
        symmetric=not asymmetric,
        coarse=coarse,
    )
    given = opened(folder)
    assert len(known) == 14 and set(given.grids) == set(known)
    grid = ("u" if asymmetric else "") + "int4-g32" + ("" if coarse else "-f16")
    assert {each.name for each in given.grids.values()} == {grid}
    for name, codes in known.items():
        np.testing.assert_array_equal(given.rows(name), codes.values())


def test_scattered_inputs_of_compressed_tensors_are_refused(made: Any) -> None:
    folder, _ = made(lambda codes: compressed(codes, torch.float16, False), settings())
    tensors = load_file(folder / "model.safetensors")
    order = torch.arange(64, dtype=torch.int32) // 32
    tensors[f"{Q}.weight_g_idx"] = order
    save_file(tensors, folder / "model.safetensors")
    assert f"{Q}.weight_g_idx" not in opened(folder).names()
    tensors[f"{Q}.weight_g_idx"] = order.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Unsupported, match="do not lie side by side"):
        opened(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float-quantized"}, "format float-quantized"),
        ({"config_groups": {}}, "unknown bits"),
        ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, "of 3 bits"),
        (
            {"config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": {"a": 1}}}},
            "activations are quantized too",
        ),
    ],
)
def test_what_is_not_read_of_compressed_tensors(
    made: Any, changes: dict[str, Any], message: str
) -> None:
    folder, _ = made(lambda codes: compressed(codes, torch.float16, False), settings(**changes))
    with pytest.raises(Unsupported, match=message):
        opened(folder)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_damage_of_compressed_tensors_is_told(made: Any, part: str) -> None:
    folder, _ = made(lambda codes: compressed(codes, torch.float16, True), settings())
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match="q_proj"):
        opened(folder)


MLX = {"quantization": {"group_size": 32, "bits": 4}}


def mlx(codes: Any, off: float = 0.0) -> dict[str, torch.Tensor]:
    """Biases are multiples of scales where `off` is 0, else beside them."""
    scale = torch.from_numpy(codes.scale)
    bias = -torch.from_numpy(codes.z) * scale + off * scale
    scales, biases = scale.half(), (bias.half() if off else bias.float())
    return {"weight": packed(codes.q).view(torch.uint32), "scales": scales, "biases": biases}


def test_biases_that_are_multiples_are_zero_points(made: Any) -> None:
    folder, known = made(mlx, MLX)
    given = opened(folder)
    assert {each.name for each in given.grids.values()} == {"uint4-g32-f16"}
    for name, codes in known.items():
        np.testing.assert_array_equal(given.rows(name), codes.values())
    assert "quantization" not in given.config


def test_other_biases_are_minima_of_blocks_in_gguf_alone(
    made: Any, run: Run, tmp_path: Path
) -> None:
    folder, known = made(lambda codes: mlx(codes, 0.25), MLX)
    given = opened(folder)
    for name, codes in known.items():
        tensor = given.load(name)
        assert isinstance(tensor, BlockTensor) and tensor.grid.name == "Q4_1"
        scale = codes.scale.astype(np.float64)
        bias = (-codes.z * codes.scale + np.float32(0.25) * codes.scale).astype(np.float16)
        q = codes.q.reshape(*scale.shape, 32)
        values = (q * scale[:, :, None] + bias.astype(np.float64)[:, :, None]).astype(np.float32)
        np.testing.assert_array_equal(given.rows(name), values.reshape(codes.q.shape))
    line = ["export", folder, "--target", "android", "--no-validate", "-q", "-o", tmp_path / "out"]
    assert run(*line, "--container", "gguf").code == 0
    assert run("verify", tmp_path / "out" / "android").code == 0
    done = run(*line, "--container", "onnx")
    assert done.code == 5 and "ONNX cannot hold the grid Q4_1" in done.err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode mxfp4"),
        ({"group_size": 32, "bits": 8}, "8 bits"),
        ({"group_size": 32, "bits": 4, "lm_head": {"bits": 8}}, "others for lm_head"),
    ],
)
def test_what_is_not_read_of_mlx(made: Any, config: dict[str, Any], message: str) -> None:
    folder, _ = made(mlx, {"quantization": config})
    with pytest.raises(Unsupported, match=message):
        opened(folder)


def test_sums_that_no_block_holds_are_refused(made: Any) -> None:
    folder, _ = made(lambda codes: mlx(codes, 0.25), MLX, group=16)
    with pytest.raises(Unsupported, match="biases are no multiples of its scales"):
        opened(folder)


def torchao(weight_dtype: str = "int4", kind: str = "IntxWeightOnlyConfig") -> dict[str, Any]:
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": weight_dtype}}
    default = {"_type": kind, "_version": 2, "_data": data}
    return {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": default}}}


@pytest.mark.parametrize("symmetric", [True, False])
def test_torchao(symmetric: bool, tiny_llama: Path, tmp_path: Path, round_to: Any) -> None:
    known, tensors = {}, {}
    for name, weight in load_file(tiny_llama / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        codes = known[name] = round_to(weight, 32, 4, symmetric)
        stem = name.removesuffix("weight") + "_weight_"
        tensors[f"{stem}qdata"] = torch.from_numpy(codes.q - 8).to(torch.int8)
        tensors[f"{stem}zero_point"] = torch.from_numpy(codes.z - 8).to(torch.int8)
        tensors[f"{stem}scale"] = torch.from_numpy(codes.scale).half()
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | torchao()))
    given = opened(folder)
    assert set(given.grids) == set(known)
    assert {g.name for g in given.grids.values()} == {f"{'' if symmetric else 'u'}int4-g32-f16"}
    for name, codes in known.items():
        np.testing.assert_array_equal(given.rows(name), codes.values())
    for other in (torchao("int3"), torchao(kind="Int8WeightOnlyConfig")):
        (folder / "config.json").write_text(json.dumps(stated | other))
        with pytest.raises(Unsupported, match="a torchao checkpoint of"):
            opened(folder)
    tensors[f"{Q}._weight_qdata"][0, 0] = 100
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(stated | torchao()))
    with pytest.raises(BadInput, match="more than 4 bits"):
        opened(folder).load(f"{Q}.weight")
