"""NF4: the very bytes of bitsandbytes, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as upstream
import numpy as np
import pytest
import torch

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import Unsupported
from slimport.export import gguf
from slimport.quantize.grid import NF4_G64
from slimport.quantize.methods import codebook
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["gaussian", "coarse", "huge", "tiny"])
def test_codes_and_scales_are_those_of_bitsandbytes(kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
    weight = {
        "gaussian": weight * np.float32(0.05),
        "coarse": np.round(weight * 16) / np.float32(16),
        "huge": weight * np.float32(1e30),
        "tiny": weight * np.float32(1e-30),
    }[kind]
    packed, state = upstream.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    pairs = packed.numpy().reshape(300, -1)
    theirs = np.stack([pairs >> 4, pairs & 15], -1).reshape(300, 512)
    ours = codebook.solve(weight, NF4_G64)
    np.testing.assert_array_equal(ours.codes + 8, theirs)
    np.testing.assert_array_equal(ours.scale.reshape(-1), state.absmax.numpy())
    values = upstream.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(ours.dequantize(), values)


def test_levels_are_those_of_bitsandbytes() -> None:
    levels = upstream.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(np.array(NF4_G64.levels, np.float32), levels)


def test_a_hand_computed_group() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[0, :5] = [-2.0, 2.0, 0.9, 0.0, 0.16]  # of the scale: -1, 1, .45, 0, .08
    found = codebook.solve(weight, NF4_G64)
    assert found.codes[0, :5].tolist() == [-8, 7, 4, -1, 0]
    assert found.scale.tolist() == [[2.0], [1.0]]
    assert (found.codes[1] == -1).all() and not found.dequantize()[1].any()


def test_blocks_of_rows_give_the_codes_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((37, 128)).astype(np.float32)
    whole = codebook.solve(weight, NF4_G64)
    monkeypatch.setattr(codebook, "_CHUNK", 300)
    np.testing.assert_array_equal(codebook.solve(weight, NF4_G64).codes, whole.codes)


def test_the_checkpoint_keeps_it_and_gguf_refuses_it(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    config = decoder_config(source.config)
    plan = make_plan(config, "nf4", "gptq", {"*down*": "int8-row"})
    assert {c.method for c in plan.quantized if c.grid is NF4_G64} == {"rtn-absmax"}
    arguments: dict[str, Any] = {"calibration": None, "tokenizer_folder": tiny_llama}
    plan = make_plan(config, "nf4", "rtn")
    assert not plan.calibrated
    made = quantize(
        source,
        source.config,
        plan,
        tmp_path / "quantized",
        progress=lambda stage, done, total: None,
        **arguments,
    )
    found = QuantizedCheckpoint.open(made.folder)
    found.verify()
    name = "model.layers.1.mlp.up_proj.weight"
    expected = codebook.solve(source.rows(name), NF4_G64)
    assert found.load(name).digest(name) == expected.digest(name)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.rows(name), expected.dequantize())
    error = np.linalg.norm(expected.dequantize() - source.rows(name))
    assert found.errors[name] == pytest.approx(error / np.linalg.norm(source.rows(name)), rel=1e-5)
    with pytest.raises(Unsupported, match="GGUF cannot hold the grid nf4-g64"):
        gguf.refuse(config, plan, Tokenizer.open(tiny_llama))
