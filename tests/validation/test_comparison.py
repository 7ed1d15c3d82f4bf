"""What `slimport compare` says of two files, held to what was written into them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as upstream
import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, UsageError
from slimport.export import gguf
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.comparison import compare

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def write(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """write(preset, method="rtn") -> a GGUF file whose rows are of 256 and 512."""
    source = Checkpoint.open(make_model("llama", hidden_size=256, intermediate_size=512))

    def call(preset: str, method: str = "rtn") -> Path:
        folder = tmp_path_factory.mktemp(preset)
        model = quantize(
            source,
            source.config,
            make_plan(decoder_config(source.config), preset, method),
            folder / "quantized",
            calibration=None,
            tokenizer_folder=source.folder,
            progress=lambda *_: None,
        )
        (path,) = gguf.write(model, Tokenizer.open(source.folder), folder)
        return path

    return call


@pytest.fixture(scope="module")
def f16(write: Any) -> Path:
    return Path(write("F16"))


@pytest.fixture(scope="module")
def mixed(write: Any) -> Path:
    return Path(write("Q4_K_M"))


def test_a_file_is_equal_to_itself(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    found = compare(mixed, mixed, tmp_path / "text")
    assert found["files"][0] == found["files"][1]
    assert found["files"][0]["bytes"] == mixed.stat().st_size
    assert all(tensor["equal"] for tensor in found["tensors"])
    assert {tensor["relative_rmse"] for tensor in found["tensors"]} == {0.0}
    assert (found["divergence"]["kl_mean"], found["divergence"]["top1"]) == (0.0, 1.0)


def test_types_and_bytes_are_those_that_gguf_py_counts(f16: Path, mixed: Path) -> None:
    found = compare(f16, mixed)
    for index, path in enumerate((f16, mixed)):
        counted: dict[str, list[int]] = {}
        for tensor in upstream.GGUFReader(path).tensors:
            entry = counted.setdefault(tensor.tensor_type.name, [0, 0])
            entry[0] += 1
            entry[1] += tensor.n_bytes
        stated = {
            name: [sides[index]["tensors"], sides[index]["bytes"]]
            for name, sides in found["types"].items()
            if sides[index]["tensors"]
        }
        assert stated == counted
        total = sum(nbytes for _, nbytes in counted.values())
        assert found["files"][index]["tensor_bytes"] == total
    assert {"F16", "Q4_K", "Q6_K"} <= found["types"].keys()
    assert found["divergence"] is None


def test_error_of_every_tensor(f16: Path, mixed: Path) -> None:
    found = {tensor["name"]: tensor for tensor in compare(f16, mixed)["tensors"]}
    assert found["output_norm.weight"]["equal"]
    up = found["blk.1.ffn_up.weight"]
    assert up["types"] == ["F16", "Q4_K"]
    sides = [
        next(t for t in upstream.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
        for path in (f16, mixed)
    ]
    ours, theirs = (upstream.dequantize(t.data, t.tensor_type).astype(np.float64) for t in sides)
    expected = np.sqrt(np.square(theirs - ours).sum() / np.square(ours).sum())
    assert up["relative_rmse"] == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected < 0.1


def test_order_turns_the_divergence(f16: Path, mixed: Path, write: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    forth, back = (compare(*pair, tmp_path / "text") for pair in ((f16, mixed), (mixed, f16)))
    assert forth["files"] == back["files"][::-1]
    assert 0 < forth["divergence"]["kl_mean"] != back["divergence"]["kl_mean"]
    coarse = compare(f16, write("Q2_K"), tmp_path / "text")
    assert coarse["divergence"]["kl_mean"] > 2 * forth["divergence"]["kl_mean"]


def test_other_shapes_and_missing_tensors(f16: Path, finished: Path) -> None:
    found = {tensor["name"]: tensor for tensor in compare(f16, finished)["tensors"]}
    assert found["output_norm.weight"]["relative_rmse"] is None
    assert not found["output_norm.weight"]["equal"]
    assert found["blk.0.attn_q.weight"]["types"] == ["F16", "Q4_0"]


def changed(path: Path, to: Path, metadata: dict[str, int]) -> Path:
    """A copy with more metadata, by gguf-py."""
    reader, writer = upstream.GGUFReader(path), upstream.GGUFWriter(to, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            parts = field.types
            sub = parts[1] if len(parts) > 1 else None
            writer.add_key_value(name, field.contents(), parts[0], sub)
    for name, value in metadata.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def test_metadata_that_changes_no_token_changes_nothing(f16: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    other = changed(f16, tmp_path / "other.gguf", {"tokenizer.ggml.seperator_token_id": 3})
    found = compare(f16, other, tmp_path / "text")
    assert found["divergence"]["kl_mean"] == 0.0
    assert all(tensor["equal"] for tensor in found["tensors"])


def test_a_part_of_a_split_model_is_refused(f16: Path, tmp_path: Path) -> None:
    part = changed(f16, tmp_path / "part.gguf", {"split.count": 2})
    with pytest.raises(BadInput, match="part of a model"):
        compare(part, f16)


def test_bundles_bring_their_reports(finished: Path, f16: Path, tmp_path: Path) -> None:
    found = compare(finished, f16)
    report = json.loads((finished / "report" / "report.json").read_text())
    assert found["reports"] == [report["accuracy"], None]
    assert found["files"][0]["beside"] == []
    damaged = Path(shutil.copytree(finished, tmp_path / "damaged"))
    with (damaged / "model.gguf").open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(50))
    with pytest.raises(BadInput, match=r"model\.gguf"):
        compare(damaged, f16)


def test_what_cannot_be_compared(
    f16: Path, tiny_qwen2: Path, make_model: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        compare(f16, tmp_path / "absent.gguf")
    with pytest.raises(BadInput):
        compare(f16, tmp_path)
    (tmp_path / "words.gguf").write_text("no model")
    with pytest.raises(BadInput):
        compare(tmp_path / "words.gguf", f16)
    (tmp_path / "text").write_text(TEXT)
    source = Checkpoint.open(tiny_qwen2)
    model = quantize(
        source,
        source.config,
        make_plan(decoder_config(source.config), "int8", "rtn"),
        tmp_path / "quantized",
        calibration=None,
        tokenizer_folder=source.folder,
        progress=lambda *_: None,
    )
    (other,) = gguf.write(model, Tokenizer.open(tiny_qwen2), tmp_path)
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(f16, other, tmp_path / "text")
    with pytest.raises(UsageError, match="does not exist"):
        compare(f16, f16, tmp_path / "no text")
