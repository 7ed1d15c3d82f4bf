"""bitsandbytes' own files, made by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported
from slimport.quantize.given import Given, open_given
from slimport.quantize.tensor import QuantizedTensor

functional = pytest.importorskip("bitsandbytes.functional")
Q = "model.layers.0.self_attn.q_proj.weight"


def opened(folder: Path) -> Given:
    given = open_given(Checkpoint.open(folder))
    assert given is not None
    return given


@pytest.fixture
def made(make_model: Any, tmp_path: Path, rewritten: Any) -> Any:
    """made(kind, double, blocksize=64, **sizes) -> (folder, {source name: what bitsandbytes makes
    of its own bytes}).
    """

    def make(
        kind: str, double: bool, blocksize: int = 64, **sizes: int
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        known = {}
        sizes = {"hidden_size": 128, "intermediate_size": 192} | sizes

        def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            packed, state = functional.quantize_4bit(
                weight.float(), blocksize=blocksize, compress_statistics=double, quant_type=kind
            )
            if weight.shape[1] % blocksize == 0:
                known[name] = functional.dequantize_4bit(packed, state)
            parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            return {"weight": packed, **parts}

        settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
        }
        source = make_model("llama", **sizes)
        config = {"quantization_config": settings}
        return rewritten(source, tmp_path / "model", tensors, config), known

    return make


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_what_bitsandbytes_makes_of_them(made: Any, kind: str, double: bool) -> None:
    folder, known = made(kind, double)
    given = opened(folder)
    assert len(known) == 14 and set(given.grids) == set(known)
    assert {grid.name for grid in given.grids.values()} == {f"{kind}-g64"}
    for name, values in known.items():
        tensor = given.load(name)
        assert isinstance(tensor, QuantizedTensor)
        np.testing.assert_array_equal(tensor.dequantize(), values.numpy())
    assert not any("absmax" in name for name in given.names())


def test_other_blocks_and_blocks_across_rows_are_refused(made: Any) -> None:
    folder, _ = made("nf4", False, blocksize=128)
    with pytest.raises(Unsupported, match="nf4 in blocks of 128"):
        opened(folder)


def test_blocks_across_rows_are_refused(made: Any) -> None:
    folder, _ = made("nf4", False, intermediate_size=160)
    with pytest.raises(Unsupported, match="rows of 160 do not divide into blocks of 64"):
        opened(folder)


def test_eight_bits_are_refused(made: Any) -> None:
    folder, _ = made("nf4", False)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"load_in_4bit"', '"load_in_8bit"'))
    with pytest.raises(Unsupported, match="not of 4 bits"):
        opened(folder)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "quant_map"])
def test_damage_is_told(made: Any, part: str) -> None:
    folder, _ = made("nf4", True)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((BadInput, Unsupported), match="q_proj"):
        opened(folder).load(Q)


def test_other_levels_are_refused(made: Any) -> None:
    folder, _ = made("nf4", False)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.quant_map"] = tensors[f"{Q}.quant_map"] * 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Unsupported, match="levels are not those of nf4"):
        opened(folder)
