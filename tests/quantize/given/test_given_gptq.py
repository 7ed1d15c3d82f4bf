"""GPTQ and AWQ checkpoints: codes as they are, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported
from slimport.quantize.given import Given, open_given

Q = "model.layers.0.self_attn.q_proj"
Make = Callable[..., tuple[Path, dict[str, Any]]]


def opened(folder: Path) -> Given:
    given = open_given(Checkpoint.open(folder))
    assert given is not None
    return given


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path, rewritten: Any, round_to: Any) -> Make:
    """made(form="gptq", group=32, bits=4, symmetric=False, stored=-1, **settings) ->
    (folder, {source name: Codes}).
    """

    def make(
        form: str = "gptq",
        group: int | None = 32,
        bits: int = 4,
        symmetric: bool = False,
        stored: int = -1,
        **settings: Any,
    ) -> tuple[Path, dict[str, Any]]:
        known: dict[str, Any] = {}

        def tensors(name: str, weight: torch.Tensor) -> Any:
            codes = round_to(weight, group or weight.shape[1], bits, symmetric)
            known[name] = codes
            return codes.awq() if form == "awq" else codes.gptq(bits, stored)

        stated = {"quant_method": form, "bits": bits, "group_size": group or -1} | settings
        folder = tmp_path / "model"
        return rewritten(tiny_llama, folder, tensors, {"quantization_config": stated}), known

    return make


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, "uint4-g32-f16"),
        ({"form": "awq"}, "uint4-g32-f16"),
        ({"form": "awq", "group": 16, "version": "GEMM"}, "uint4-g16-f16"),
        ({"group": 16, "stored": 0, "checkpoint_format": "gptq_v2"}, "uint4-g16-f16"),
        ({"group": None, "symmetric": True}, "int4-row-f16"),
        ({"symmetric": True}, "int4-g32-f16"),
        ({"bits": 8, "symmetric": True}, "int8-g32-f16"),
    ],
)
def test_weights_are_what_the_layout_says(made: Make, options: dict[str, Any], grid: str) -> None:
    folder, known = made(**options)
    given = opened(folder)
    assert set(given.grids) == set(known) and len(known) == 14
    assert {each.name for each in given.grids.values()} == {grid}
    for name, codes in known.items():
        tensor = given.load(name)
        np.testing.assert_array_equal(tensor.dequantize(), codes.values())
        np.testing.assert_array_equal(given.rows(name, 3, 9), codes.values()[3:9])
        assert given.shape(name) == codes.q.shape
    original = Checkpoint.open(folder)
    assert set(given.names()) - set(known) == {n for n in original.names() if n.endswith(".weight")}
    assert "quantization_config" not in given.config


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", [-1, 0])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_values_decide_what_a_label_should(
    made: Make, symmetric: bool, stored: int, label: str
) -> None:
    folder, known = made(symmetric=symmetric, stored=stored, checkpoint_format=label)
    given = opened(folder)
    for name, codes in known.items():
        np.testing.assert_array_equal(given.load(name).dequantize(), codes.values())


def test_what_values_do_not_tell_is_refused(made: Make) -> None:
    folder, _ = made()

    def shift(tensors: dict[str, torch.Tensor]) -> None:  # half of the codes of a weight
        q = tensors[f"{Q}.qweight"]
        q[: len(q) // 2] = 0

    change(folder, shift)
    with pytest.raises(BadInput, match="whether its zero points are stored less 1 cannot be told"):
        opened(folder)


def test_scales_of_eight_bits_are_portable(made: Make) -> None:
    folder, _ = made(symmetric=True)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("scales"):
                tensors[name] = tensors[name].bfloat16().half()

    change(folder, cut)
    assert {each.name for each in opened(folder).grids.values()} == {"int4-g32"}


def test_scattered_groups_are_refused(made: Make) -> None:
    folder, _ = made(desc_act=True)

    def scatter(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0).contiguous()

    change(folder, scatter)
    with pytest.raises(Unsupported, match="do not lie side by side") as failure:
        opened(folder)
    assert "desc_act = false" in failure.value.cure


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "codes of 8 bits with zero points"),
        ({"checkpoint_format": "marlin"}, "format marlin"),
        ({"form": "awq", "version": "gemv"}, "version gemv"),
        ({"form": "quanto"}, "quantized by quanto"),
    ],
)
def test_what_is_not_held_is_refused(made: Make, options: dict[str, Any], message: str) -> None:
    folder, _ = made(**options)
    with pytest.raises(Unsupported, match=message):
        opened(folder)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx", "qweight"])
def test_damage_is_told(made: Make, part: str) -> None:
    folder, _ = made()
    name = f"{Q}.{part}"
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises((BadInput, Unsupported), match="q_proj"):
        opened(folder)


def test_no_codes_are_told(tiny_llama: Path, tmp_path: Path, rewritten: Any) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = rewritten(tiny_llama, tmp_path / "m", lambda name, tensor: None, settings)
    with pytest.raises(BadInput, match="no weight is quantized"):
        opened(folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | {"quantization_config": 4}))
    with pytest.raises(BadInput, match="quantization_config is no object"):
        opened(folder)
