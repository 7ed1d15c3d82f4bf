"""Files of ggml's own types and llama.cpp's mixes: exact sizes, exact bytes, run by llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as upstream
import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, ValidationFailed
from slimport.export import gguf
from slimport.export.gguf.reader import open_gguf
from slimport.quantize.blocks import BLOCK_GRIDS
from slimport.quantize.imatrix import Imatrix
from slimport.quantize.mixes import MIXES
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import divergence
from slimport.validation.runtimes import llamacpp, reference
from slimport.validation.runtimes.reference import Oracle

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def wide(make_model: Any) -> Checkpoint:
    """Rows of 256 and 512: every block of ggml divides them."""
    return Checkpoint.open(make_model("llama", hidden_size=256, intermediate_size=512))


def made(
    source: Checkpoint, folder: Path, preset: str, patterns: Mapping[str, str] = {}
) -> QuantizedCheckpoint:
    """By ggml's kernels with a matrix that says that all inputs matter alike."""
    config = decoder_config(source.config)
    plan = make_plan(config, preset, "imatrix", patterns)
    equal = {
        choice.weight.name: np.ones(choice.weight.shape[1], np.float32)
        for choice in plan.choices
        if choice.weight.is_linear
    }
    return quantize(
        source,
        source.config,
        plan,
        folder,
        calibration=Imatrix(equal, 1, 1, ()),
        tokenizer_folder=source.folder,
        progress=lambda *_: None,
    )


@pytest.mark.parametrize(
    ("mix", "hidden"),
    [(mix, 256) for mix in MIXES] + [(mix, 288) for mix in ("Q4_K_M", "Q2_K", "IQ2_M")],
)
def test_sizes_are_predicted_and_every_byte_is_read_back(
    mix: str, hidden: int, make_model: Any, tmp_path: Path
) -> None:
    source = Checkpoint.open(make_model("llama", hidden_size=hidden, intermediate_size=512))
    tokenizer = Tokenizer.open(source.folder)
    model = made(source, tmp_path / "q", mix)
    (path,) = gguf.write(model, tokenizer, tmp_path)
    predicted = gguf.predict(model.decoder, model.plan, tokenizer, model.name)
    assert predicted == {"model.gguf": path.stat().st_size}
    checked = gguf.check(model, tmp_path)
    assert checked.weights_digest == model.weights_digest
    found = open_gguf(path)
    stated = found.metadata["general.file_type"]
    assert stated == upstream.LlamaFileType.__members__.get(f"MOSTLY_{mix}", 1024)
    grids = {c.weight.gguf: c.grid.name if c.grid else None for c in model.plan.choices}
    for name, tensor in found.tensors.items():
        expected = grids[name] or ("F16" if len(tensor.shape) == 2 else "F32")
        assert tensor.type.name == expected


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_llama_cpp_runs_every_type(
    name: str, wide: Checkpoint, at_hand: None, tmp_path: Path
) -> None:
    """Its logits are those of the dequantized weights but for 8-bit activations."""
    model = made(wide, tmp_path / "q", "F16", {"model.layers.*": name})
    (path,) = gguf.write(model, Tokenizer.open(wide.folder), tmp_path)
    ids = np.random.default_rng(0).integers(400, size=(2, 64)).astype(np.int32)
    llamacpp.logits(path, ids, tmp_path / "got.npy", threads=1, kv_cache="f32")
    codes = Oracle(model.folder, quantized=True)
    reference.logits(codes, ids, tmp_path / "want.npy", threads=1)
    reference.logits(Oracle(wide.folder), ids, tmp_path / "full.npy", threads=1)
    runtime = divergence.compare(tmp_path / "want.npy", tmp_path / "got.npy", ids).kl_mean
    lost = divergence.compare(tmp_path / "full.npy", tmp_path / "got.npy", ids).kl_mean
    assert runtime < 0.0135  # 0.005 for blocks of 32, whose activations have finer blocks, too
    assert lost > 1.5 * runtime


def test_a_changed_byte_is_found(wide: Checkpoint, tmp_path: Path) -> None:
    model = made(wide, tmp_path / "q", "Q4_K_M")
    (path,) = gguf.write(model, Tokenizer.open(wide.folder), tmp_path)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValidationFailed, match="the file does not hold what was quantized"):
        gguf.check(model, tmp_path)


def test_the_grids_must_be_those_of_the_file(wide: Checkpoint, tmp_path: Path) -> None:
    model = made(wide, tmp_path / "q", "Q4_0")
    gguf.write(model, Tokenizer.open(wide.folder), tmp_path)
    grids = {c.weight.name: c.grid.name for c in model.plan.choices if c.grid}
    with pytest.raises(BadInput, match="Q4_0, which does not hold Q4_K"):
        list(gguf.read_back(tmp_path, model.decoder, {**grids, UP: "Q4_K"}))
