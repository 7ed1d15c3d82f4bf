"""Importance matrices: what is measured, llama.cpp's format, and files that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM

from slimport.architectures import DecoderConfig, decoder_config, weights
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, EnvironmentFailed, UsageError
from slimport.quantize import imatrix
from slimport.quantize.calibration import importance
from slimport.quantize.imatrix import Imatrix
from slimport.quantize.windows import windows_of

Measured = tuple[Imatrix, DecoderConfig]


@pytest.fixture(scope="module")
def measured(tiny_llama: Path) -> Measured:
    source = Checkpoint.open(tiny_llama)
    config = decoder_config(source.config)
    windows = windows_of(np.random.default_rng(0).integers(0, 400, (53, 40)))
    seen: list[tuple[str, int, int]] = []
    found = importance(source, config, windows, lambda *step: seen.append(step))
    assert seen[-1] == ("importance matrix", 2, 2)
    return replace(found, texts=("text.txt",)), config


def test_it_is_the_mean_square_of_what_transformers_feeds(
    measured: Measured, tiny_llama: Path
) -> None:
    matrix, _ = measured
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    squares: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda _, inputs, __, name=name: squares.__setitem__(
                    f"{name}.weight", inputs[0].double().square().mean((0, 1))
                )
            )
    model(torch.from_numpy(np.random.default_rng(0).integers(0, 400, (53, 40))))
    assert set(squares) == set(matrix.importance)
    for name, expected in squares.items():
        np.testing.assert_allclose(matrix.importance[name], expected.detach().numpy(), rtol=1e-4)


def test_what_is_written_is_read(measured: Measured, tmp_path: Path) -> None:
    matrix, config = measured
    imatrix.write(matrix, tmp_path / "m.gguf", config)
    again = imatrix.read(tmp_path / "m.gguf", config)
    assert again.texts == ("text.txt",) and (again.tokens, again.window) == (2120, 40)
    for name, values in matrix.importance.items():
        np.testing.assert_array_equal(again.importance[name], values)
    assert again.digest == matrix.digest
    imatrix.write(again, tmp_path / "again.gguf", config)
    assert imatrix.read(tmp_path / "again.gguf", config).digest == again.digest
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_file_is_llama_cpps(measured: Measured, tmp_path: Path) -> None:
    """Keys, names and shapes as tools/imatrix/imatrix.cpp writes them."""
    matrix, config = measured
    imatrix.write(matrix, tmp_path / "m.gguf", config)
    reader = GGUFReader(tmp_path / "m.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if "GGUF" not in name}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 53,
        "imatrix.chunk_size": 40,
    }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == [96, 1]
    assert shapes["blk.1.ffn_down.weight.counts"] == [1, 1]
    assert len(shapes) == 2 * 14


def test_nothing_is_overwritten(measured: Measured, tmp_path: Path) -> None:
    matrix, config = measured
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        imatrix.write(matrix, tmp_path / "m.gguf", config)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        imatrix.write(matrix, tmp_path / "absent" / "m.gguf", config)


def _file(path: Path, kind: str, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["t"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_importance_matrix_of_the_model_is_refused(
    measured: Measured, tmp_path: Path
) -> None:
    matrix, config = measured
    good: dict[str, np.ndarray[Any, Any]] = {}
    for weight in weights(config):
        if weight.is_linear:
            good[f"{weight.gguf}.in_sum2"] = matrix.sums[weight.name].reshape(1, -1)
            good[f"{weight.gguf}.counts"] = np.full((1, 1), 8, np.float32)
    first, count = "blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"
    nothing = np.zeros((1, 1), np.float32)

    def with_counts(tokens: float) -> dict[str, np.ndarray[Any, Any]]:
        every = np.full((1, 1), tokens, np.float32)
        return {name: every if "counts" in name else values for name, values in good.items()}

    bad = {
        "another kind": ("model", good, "general.type is 'model'"),
        "another model": ("imatrix", {**good, "blk.9.ffn_up.weight.in_sum2": nothing}, "blk.9"),
        "another size": ("imatrix", {**good, first: good[first][:, :-1]}, "64 inputs"),
        "other counts": ("imatrix", {**good, count: nothing}, "sums are over"),
        "no tokens": ("imatrix", with_counts(0), "over 0 tokens"),
        "infinite": ("imatrix", with_counts(np.inf), "over inf tokens"),
        "half a token": ("imatrix", with_counts(0.5), "over 0.5 tokens"),
        "doubles": ("imatrix", {**good, first: good[first].astype(float)}, "of float64"),
        "a square": ("imatrix", {**good, first: good[first].reshape(8, 8)}, "shape"),
        "negative": ("imatrix", {**good, first: -good[first]}, "no sums of squares"),
        "not finite": ("imatrix", {**good, first: good[first] * np.nan}, "no sums of squares"),
        "no counts": ("imatrix", {k: v for k, v in good.items() if k != count}, "attn_q"),
        "a weight missing": (
            "imatrix",
            {k: v for k, v in good.items() if "attn_q" not in k},
            "no importance of blk.0.attn_q",
        ),
    }
    for what, (kind, tensors, why) in bad.items():
        path = _file(tmp_path / f"{what}.gguf", kind, tensors)
        with pytest.raises(BadInput, match=why):
            imatrix.read(path, config)
    assert imatrix.read(_file(tmp_path / "good.gguf", "imatrix", good), config).tokens == 8


def test_files_that_are_damaged_are_refused(measured: Measured, tmp_path: Path) -> None:
    matrix, config = measured
    imatrix.write(matrix, tmp_path / "m.gguf", config)
    data = (tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for length in (0, 3, 20, 100, 500, 1500, len(data) // 2, len(data) - 100):
        broken.write_bytes(data[:length])
        with pytest.raises(BadInput, match="no importance matrix"):
            imatrix.read(broken, config)
    rng = np.random.default_rng(0)
    for _ in range(60):  # never another error
        damaged = bytearray(data)
        for place in rng.integers(0, 2000, 3):
            damaged[place] = rng.integers(256)
        broken.write_bytes(damaged)
        try:
            imatrix.read(broken, config)
        except BadInput:
            continue


def test_the_digest_is_of_the_values(measured: Measured) -> None:
    matrix, _ = measured
    name = next(iter(matrix.sums))
    other = {**matrix.sums, name: matrix.sums[name] * 2}
    assert replace(matrix, sums=other).digest != matrix.digest
    assert replace(matrix, texts=("other",)).digest == matrix.digest
