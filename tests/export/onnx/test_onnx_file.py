"""Whole folders: exact sizes, exact codes, and logits of transformers in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from slimport.architectures import FAMILIES, Kind, weights
from slimport.errors import Unsupported, ValidationFailed
from slimport.export import onnx as container
from slimport.export.container import Deployment
from slimport.export.onnx import layout
from slimport.export.onnx.reader import DATA, MODEL, open_file
from slimport.quantize.grid import INT8_ROW
from slimport.quantize.plan import make_plan
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import onnxruntime

FLOAT = {"*": "float16"}
Variant = tuple[str, dict[str, Any]]


def export(model: Any, folder: Path, target: Path, context: int = 64, *adapted: Kind) -> Path:
    """Write the files and hold them to their predicted sizes."""
    tokenizer = Tokenizer.open(folder)
    deployment = Deployment(context, frozenset(adapted))
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    assert predicted == {file.name: file.stat().st_size for file in files}
    assert files[0].name == container.FILE
    return files[0]


def windows(vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(1).integers(0, vocabulary, (2, 64), dtype=np.int32)


def test_onnxruntime_computes_the_logits_of_transformers(
    variant: Variant,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Any,
) -> None:
    monkeypatch.setattr(layout, "FLOAT_MATRIX", "<f4")
    family, overrides = variant
    folder = make_model(family, **overrides)
    model = in_memory(folder, patterns=FLOAT)
    if model.decoder.rope.share != 1 and "rope_parameters" in overrides:
        with pytest.raises(Unsupported, match="cannot rotate 12 numbers"):
            container.refuse(model.decoder, model.plan, Tokenizer.open(folder))
        return
    tokens = windows(model.decoder.vocab_size)
    onnxruntime.logits(export(model, folder, tmp_path), tokens, tmp_path / "o.npy")
    difference = np.abs(np.load(tmp_path / "o.npy") - oracle(folder, tokens, model.tensors))
    assert difference.max() < (2e-4 if "gemma" in family else 3e-5)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"*": "int4-g32"},
        {"*": "int4-g32-signed"},
        {"*": "int8-row"},
        {"*": "int8-g32"},
        {"*": "uint4-g16-f16", "*down*": "uint4-row", "*up*": "int4-g128", "*gate*": "int4-row"},
        {"*": "int8-g64-f16", "*down*": "uint4-g128", "*up*": "int4-g16-f16"},
        {"*": "int2-g64"},
        {"*": "int2-g256"},
        {"*.layers.*": "nf4-g64", "*up*": "fp4-g64", "*q_proj*": "fp4-g64"},
        {"*v_proj*": "int8-row"},
        {"*": "float16", "*down*": "int2-g64"},
    ],
    ids=lambda patterns: "_".join(patterns.values()) or "int4",
)
@pytest.mark.parametrize("tied", [True, False])
def test_exact_products_are_those_of_the_codes(
    patterns: dict[str, str],
    tied: bool,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    oracle: Any,
) -> None:
    folder = make_model(
        "qwen2",
        tie_word_embeddings=tied,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
    )
    model = in_memory(folder, patterns=patterns)
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, QuantizedTensor) and tensor.ndim == 2:
            model.tensors[name] = tensor.astype(np.float16).astype(np.float32)
    tokens = windows(model.decoder.vocab_size)
    file = export(model, folder, tmp_path)
    assert onnxruntime.exact_logits(file, tokens, tmp_path / "o.npy")
    expected = oracle(folder, tokens, model.tensors)
    assert np.abs(np.load(tmp_path / "o.npy") - expected).max() < 1e-4
    onnxruntime.logits(file, tokens, tmp_path / "shipped.npy")
    shipped = np.abs(np.load(tmp_path / "shipped.npy") - expected)
    assert np.median(shipped) < 0.2  # of logits that spread over whole units


@pytest.mark.parametrize(("grid", "set_"), [("int4-g32", False), ("int4-g32-f16", True)])
def test_scales_that_kleidiai_would_cut_are_kept_from_it(
    grid: str, set_: bool, tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama, patterns={"*down*": grid})
    export(model, tiny_llama, tmp_path)
    stated = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]
    assert (stated["session_options"].get("mlas.disable_kleidiai") == "1") == set_
    notes = container.notes(model.decoder, model.plan, Tokenizer.open(tiny_llama))
    assert any("mlas.disable_kleidiai" in note for note in notes) == set_
    import onnxruntime_genai

    onnxruntime_genai.Config(str(tmp_path))  # it reads the option


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "preset", ["int4", "int4-all", "int4-signed", "int8", "mixed", "int2", "nf4"]
)
def test_every_code_comes_back(
    family: str, preset: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    tied = family != "olmo2" and preset != "int4-all"
    folder = make_model(family, tie_word_embeddings=tied, intermediate_size=128)
    model = in_memory(folder, preset)
    export(model, folder, tmp_path)
    found = container.check(model, tmp_path)
    digests = {}
    for name, tensor in container.read_back(tmp_path, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor)
            assert tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
        else:
            assert not isinstance(tensor, QuantizedTensor)
            assert found.float_errors[name] == 0
            np.testing.assert_array_equal(tensor, expected)
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}
    assert found.weights_digest == weights_digest(digests)
    assert found.digests == digests


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(in_memory(tiny_llama), tiny_llama, tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]


def test_a_rows_scale_is_repeated_where_that_costs_least() -> None:
    # 576: 9 blocks of 66 bytes; 3 of 258 would leave 192 codes unused.
    blocks = {64: 64, 256: 256, 576: 64, 960: 64, 100: 16}
    assert {columns: layout.block_of(INT8_ROW, columns) for columns in blocks} == blocks


def test_rows_that_no_block_divides_are_filled_up(
    make_model: Any, in_memory: Any, tmp_path: Path, oracle: Any
) -> None:
    folder = make_model("llama", hidden_size=72, num_attention_heads=2, head_dim=32)
    model = in_memory(folder, patterns={"*": "int8-row"})
    tokens = windows(model.decoder.vocab_size)
    file = export(model, folder, tmp_path)
    container.check(model, tmp_path)
    assert onnxruntime.exact_logits(file, tokens, tmp_path / "o.npy")
    expected = oracle(folder, tokens, model.tensors)
    assert np.abs(np.load(tmp_path / "o.npy") - expected).max() < 1e-4


def test_tensors_are_aligned_shared_and_without_needless_zero_points(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    export(in_memory(tiny_llama, "int2"), tiny_llama, tmp_path)
    model = onnx.load_model(tmp_path / MODEL, load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert int(entries["offset"]) % 64 == 0
            places[tensor.name] = (entries["offset"], entries["length"])
        else:
            assert tensor.ByteSize() < 200
    table = "model.embed_tokens.codes"
    assert places[table] == places[f"{table}.rows"]
    assert not any("lm_head" in name for name in places)
    assert all("zero_point" not in name for name in places if "embed" in name)
    assert "model.layers.0.mlp.up_proj.zero_point" in places  # 2 bits: 1, not 2
    file = open_file(tmp_path)
    assert not any("g_idx" in value for node in file.nodes.values() for value in node.input)


def test_q_k_and_v_are_one_product_if_their_grids_agree(
    tiny_llama: Path, make_model: Any, in_memory: Any
) -> None:
    def kinds(model: Any, *adapted: Kind) -> set[Kind]:
        found = layout.layout(model.decoder, model.plan, Deployment(8, frozenset(adapted)))
        return {kind for layer, kind in found.matrices if layer == 0}

    plain = in_memory(tiny_llama)
    assert Kind.QKV in kinds(plain) and Kind.Q not in kinds(plain)
    assert Kind.QKV in kinds(plain, Kind.DOWN)
    assert Kind.QKV not in kinds(plain, Kind.V)
    assert Kind.QKV not in kinds(in_memory(tiny_llama, patterns={"*v_proj*": "int8-row"}))
    assert Kind.QKV not in kinds(in_memory(make_model("qwen3")))


def test_ggml_types_are_refused(make_model: Any, in_memory: Any) -> None:
    folder = make_model("llama", hidden_size=256, num_attention_heads=8)
    model = in_memory(folder)
    plan = make_plan(model.decoder, "Q4_K_M", "rtn")
    with pytest.raises(Unsupported, match="ONNX cannot hold the grid"):
        container.refuse(model.decoder, plan, Tokenizer.open(folder))


def test_a_text_longer_than_the_files_are_made_for_is_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    file = export(in_memory(tiny_llama), tiny_llama, tmp_path, context=32)
    with pytest.raises(ValidationFailed, match="cannot run"):
        onnxruntime.logits(file, windows(416), tmp_path / "o.npy")


@pytest.mark.slow
def test_more_than_two_gigabytes(make_model: Any, in_memory: Any, tmp_path: Path) -> None:
    """Weights lie outside of the graph's file, which could not hold them."""
    folder = make_model(
        "llama", tie_word_embeddings=False, hidden_size=1024, num_attention_heads=64
    )
    model = in_memory(folder, patterns=FLOAT)
    large = dataclasses.replace(model.decoder, vocab_size=600_000)
    plan = make_plan(large, "int4", "rtn", FLOAT)
    last = np.zeros((600_000, 1024), np.float32)
    last[-1] = 1
    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), last)
    whole = dataclasses.replace(model, decoder=large, plan=plan, tensors=model.tensors | tables)
    file = container.write(whole, Tokenizer.open(folder), tmp_path, Deployment(16))[0]
    assert (tmp_path / DATA).stat().st_size > 2**31
    found = container.check(whole, tmp_path)
    assert not any(found.float_errors[name] for name in tables)
    onnxruntime.logits(file, np.array([[599_999]], np.int32), tmp_path / "o.npy")
    logits = np.load(tmp_path / "o.npy")[0, 0]
    assert logits[-1] != 0 and not logits[:-1].any()  # the last row is the last row


@pytest.mark.parametrize("reward", [True, False])
def test_every_tensor_of_the_graph_is_used(
    reward: bool, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    """ONNX Runtime warns of others at every load."""
    folder = make_model("qwen2", tie_word_embeddings=False, reward=reward)
    model = onnx.load_model(export(in_memory(folder), folder, tmp_path), load_external_data=False)
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
