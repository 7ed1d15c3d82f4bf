"""Checkpoints for transformers: what is written is what its own libraries load."""

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
from transformers import AutoModelForCausalLM

from slimport.checkpoint import Checkpoint
from slimport.quantize.given import open_given
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.written.bitsandbytes import dynamic_map, nested

Run = Callable[..., Any]
Q = "model.layers.0.self_attn.q_proj"
TABLE = ["--grid", "model.embed_tokens.weight=float16"]


@pytest.fixture(scope="module")
def model(make_model: Any) -> Path:
    folder: Path = make_model("llama", hidden_size=128, intermediate_size=192)
    return folder


@pytest.fixture
def written(model: Path, run: Run, tmp_path: Path) -> Callable[..., Path]:
    """written(format, *flags) -> folder"""

    def write(format: str, *flags: object) -> Path:
        done = run("quantize", model, "--format", format, *flags, "-o", tmp_path / format, "-q")
        assert done.code == 0, done.err
        return tmp_path / format

    return write


@pytest.mark.parametrize(
    ("grid", "label", "stored"),
    [
        ("int4-g32", "gptq", 0x77777777),
        ("int8-row", "gptq", 0x7F7F7F7F),
        ("uint4-g64", "gptq_v2", None),
    ],
)
def test_gptq_holds_the_codes_of_the_plan(
    grid: str, label: str, stored: int | None, written: Any, model: Path, run: Run, tmp_path: Path
) -> None:
    flags = ["--method", "rtn", "--grid", f"*_proj.weight={grid}", *TABLE]
    folder = written("gptq", *flags)
    own = ["quantize", model, *flags, "-o", tmp_path / "own", "-q"]
    assert run(*own).code == 0
    codes, given = QuantizedCheckpoint.open(tmp_path / "own"), open_given(Checkpoint.open(folder))
    assert given is not None and len(given.grids) == 14
    for name, found in given.grids.items():
        assert found.name.removesuffix("-f16") == grid
        np.testing.assert_array_equal(given.rows(name), codes.rows(name))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    assert settings["checkpoint_format"] == label and settings["sym"] == (stored is not None)
    tensors = load_file(folder / "model.safetensors")
    if stored is not None:
        assert (tensors[f"{Q}.qzeros"] == stored).all()
    floats = {tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")}
    assert floats == {torch.float32}  # norms that float16 does not hold
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "config.json"}
    assert not (folder / "codes").exists()


def test_bitsandbytes_bytes_are_those_of_the_library(written: Any, model: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = load_file(model / "model.safetensors")
    tensors = load_file(written("bitsandbytes", "--preset", "nf4") / "model.safetensors")
    for name in (n for n in weights if "_proj" in n):
        packed, state = functional.quantize_4bit(weights[name], blocksize=64, quant_type="nf4")
        assert torch.equal(tensors[name], packed)
        parts = state.as_dict(packed=True)
        for part in ("absmax", "quant_map"):
            assert torch.equal(tensors[f"{name}.{part}"], parts[part])
        key = "quant_state.bitsandbytes__nf4"
        pair = tensors[f"{name}.{key}"], parts[key]
        ours, theirs = (json.loads(bytes(each.tolist())) for each in pair)
        assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("format", "kind", "dtype"),
    [
        ("bitsandbytes", "nf4", torch.float32),
        ("bitsandbytes-double", "nf4", torch.float16),
        ("bitsandbytes-double", "fp4", torch.float32),
    ],
)
def test_transformers_computes_with_the_codes(
    format: str, kind: str, dtype: torch.dtype, model: Path, run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    source = tmp_path / "source"
    shutil.copytree(model, source)
    if dtype is torch.float16:  # norms that float16 holds
        tensors = load_file(source / "model.safetensors")
        halved = {name: t.half().float() if t.ndim == 1 else t for name, t in tensors.items()}
        save_file(halved, source / "model.safetensors")
    flags = ["--preset", "nf4"] if kind == "nf4" else ["--grid", "*_proj.weight=fp4-g64"]
    folder = tmp_path / "out"
    line = ["quantize", source, "--format", format, *flags, "--method", "rtn", "-o", folder, "-q"]
    assert run(*line).code == 0
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    given = open_given(Checkpoint.open(folder))
    assert given is not None and {g.name for g in given.grids.values()} == {f"{kind}-g64"}
    config = theirs.config
    del config.quantization_config
    ours = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {name: torch.from_numpy(given.rows(name)) for name in given.names()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    ours.tie_weights()
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        found, wanted = theirs(ids).logits, ours.eval()(ids).logits
    assert found.dtype == dtype and torch.equal(found, wanted)


def test_double_quantization_is_near_and_smaller(written: Any) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map()  # its last bit depends on the CPU
    torch.testing.assert_close(torch.from_numpy(dynamic_map()), theirs, rtol=2**-23, atol=0)
    scale = np.random.default_rng(0).uniform(0.01, 0.1, 1000).astype(np.float32)
    inner = nested(scale)
    assert inner.largest.shape == (4,) and inner.places.dtype == np.uint8
    steps = np.abs(inner.scales() - scale) / inner.largest.repeat(256)[:1000]
    assert steps.max() < 0.0071  # half of (1 - 0.1) / 64
    alike = nested(np.full(300, 0.25, np.float32))
    np.testing.assert_array_equal(alike.scales(), 0.25)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--format", "gptq", "--preset", "nf4"], 5, "gptq checkpoints cannot hold nf4-g64"),
        (["--format", "gptq", "--preset", "mixed"], 5, "int4-g32 and int8-row together"),
        (["--format", "bitsandbytes"], 5, "bitsandbytes checkpoints cannot hold int4-g32"),
        (["--format", "gptq", "--grid", "*=float16"], 5, "of weights in float16 alone"),
        (["--format", "marlin"], 2, "marlin"),
    ],
)
def test_what_a_format_does_not_hold_is_refused(
    flags: list[str], code: int, message: str, model: Path, run: Run, tmp_path: Path
) -> None:
    done = run("quantize", model, *flags, "--method", "rtn", "-o", tmp_path / "out", "-q")
    assert done.code == code and message in done.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced(model: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    line = ["quantize", model, "--format", "bitsandbytes", "--preset", "nf4", "-o", tmp_path]
    assert run(*line).code == 2 and (tmp_path / "kept").read_text() == "mine"


def test_a_checkpoint_is_written_in_another_format(written: Any, run: Run, tmp_path: Path) -> None:
    """From GPTQ to GPTQ, as the file says: nothing is quantized again."""
    first = written("gptq", "--method", "rtn")
    done = run("quantize", first, "--format", "gptq", "-o", tmp_path / "second", "-q")
    assert done.code == 0, done.err
    files = ("model.safetensors", "config.json", "quantize_config.json")
    for name in files:
        assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
