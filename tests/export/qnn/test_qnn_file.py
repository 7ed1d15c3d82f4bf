"""Folders of context binaries: codes that come back, equal bytes, and what is never silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import qnn as container
from slimport.export.container import Deployment
from slimport.export.layout import INT4
from slimport.export.qnn import compilation, packing, reader
from slimport.export.qnn.chips import CHIPS, Chip
from slimport.export.qnn.delegation import delegated
from slimport.export.qnn.encoding import Encodings, encoding_of
from slimport.quantize.plan import Plan
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.targets.target import HEXAGONS
from slimport.validation.runtimes import qnn as runtime

pytest.importorskip("onnxruntime_qnn")  # an extra, which `make setup` installs

Change = Callable[[onnx.ModelProto], None]
Written = tuple[Any, Path]
GRIDS = {"*.1.self_attn*": "int8-row", "*.0.mlp.up_proj.weight": "int4-g32-signed"}


@pytest.fixture(scope="module")
def written(
    make_model: Any, in_memory: Any, export: Any, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    """int4-g32, signed scales in one matrix, int8-row tables and a layer's attention."""
    source = make_model("llama", head_dim=32)
    model = in_memory(source, "int4", GRIDS)
    return model, export(model, source, tmp_path_factory.mktemp("qnn") / "files").parent


def copied(written: Written, target: Path) -> Path:
    return shutil.copytree(written[1], target / "copy")


def changed(folder: Path, change: Change, *names: str) -> None:
    for name in names or reader.GRAPHS:
        path = folder / "qdq" / f"{name}.onnx"
        model = onnx.load_model(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())


def test_every_code_comes_back(written: Written) -> None:
    model, folder = written
    found = container.check(model, folder)
    digests = {}
    for name, tensor in container.read_back(folder, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor) and tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
        else:
            assert isinstance(tensor, np.ndarray)
            assert 0 < found.float_errors[name] < 1e-4  # half a step of 16 bits
            np.testing.assert_allclose(tensor, expected, atol=1e-4)
    assert found.weights_digest == weights_digest(digests) and found.digests == digests


def test_nothing_of_qualcomms_is_in_the_files(written: Written) -> None:
    names = {path.name for path in written[1].rglob("*") if path.is_file()}
    assert names == {
        *("decode.onnx", "decode_qnn.bin", "prefill.onnx", "prefill_qnn.bin"),
        *("tables.data", "qnn.json", "tokenizer.json", "model.data"),
    }
    for path in written[1].rglob("*"):
        assert not path.is_file() or path.read_bytes()[:4] != b"\x7fELF"


def test_the_npu_holds_everything(written: Written) -> None:
    file = written[1] / container.FILE
    assert runtime.accelerator(file).to_json() == {"npu_nodes": 1.0, "npu_weight_bytes": 1.0}
    assert runtime.accelerator(file).nodes == 1.0
    for name in ("decode", "prefill"):
        model = onnx.load_model(written[1] / f"{name}.onnx")
        assert [node.op_type for node in model.graph.node] == ["EPContext"]
        assert {i.type.tensor_type.elem_type for i in model.graph.input} == {
            TensorProto.UINT16,
            TensorProto.INT16,
        }


def test_two_exports_are_the_same_bytes(
    written: Written, make_model: Any, export: Any, tmp_path: Path
) -> None:
    model, first = written
    second = export(model, make_model("llama", head_dim=32), tmp_path / "again").parent
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


def test_a_binary_says_which_chip_it_is_for(written: Written, tmp_path: Path) -> None:
    binary = written[1] / "decode_qnn.bin"
    compilation.require_chip(binary, CHIPS[73])
    with pytest.raises(ValidationFailed, match="is not for SM8650"):
        compilation.require_chip(binary, CHIPS[75])
    (tmp_path / "silent.bin").write_bytes(b"nothing")
    with pytest.raises(ValidationFailed, match="no chip"):
        compilation.require_chip(tmp_path / "silent.bin", CHIPS[73])


def test_an_unknown_chip_does_not_become_another(written: Written, tmp_path: Path) -> None:
    """QNN compiles for v68 without a word: int16 caches stop it, and the text in the binary."""
    folder = copied(written, tmp_path)
    for name in ("decode.onnx", "decode_qnn.bin"):
        (folder / name).unlink()
    unknown = Chip(74, "SM0000", 9999)
    with pytest.raises(ValidationFailed):
        compilation.compile_graph(folder, "decode", "qdq/decode.onnx", unknown)
    assert not (folder / "decode.onnx").exists() and not (folder / "decode_qnn.bin").exists()


def test_the_chips_are_those_of_the_targets() -> None:
    assert tuple(CHIPS) == HEXAGONS
    for hexagon in (None, 68, 74):
        with pytest.raises(Unsupported, match="Hexagon processor"):
            container.refuse_deployment(Plan("int4", ()), Deployment(64, hexagon=hexagon))


def _graph_with(kind: str) -> bytes:
    """uint16 in, uint16 out, with one operator between."""
    scale = numpy_helper.from_array(np.array(1e-4, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(32768, np.uint16), "zero")
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["a"]),
        helper.make_node(kind, ["a"], ["b"], name="odd"),
        helper.make_node("QuantizeLinear", ["b", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT16, [1, 8, 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "odd", ends[:1], ends[1:], [scale, zero])
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_what_would_run_on_the_cpu_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "odd.onnx").write_bytes(_graph_with("Erf"))
    with pytest.raises(ValidationFailed) as failure:
        compilation.compile_graph(tmp_path, "made", "odd.onnx", CHIPS[73])
    assert "does not put the whole graph on the NPU" in failure.value.what
    assert "Erf" in failure.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]


def test_a_part_left_outside_is_counted(written: Written, tmp_path: Path) -> None:
    folder = written[1]
    graph = folder / "qdq" / "decode.onnx"
    nodes = len(onnx.load_model(graph, load_external_data=False).graph.node)
    left = onnx.load_model(folder / "decode.onnx")
    left.graph.node.append(helper.make_node("Erf", ["a"], ["b"]))
    left.graph.initializer.append(numpy_helper.from_array(np.zeros(10, np.float32), "c"))
    (tmp_path / "left.onnx").write_bytes(left.SerializeToString())
    found = delegated(graph, tmp_path / "left.onnx")
    assert (found.nodes - found.npu_nodes, found.nodes) == (1, nodes)
    assert found.weight_bytes - found.npu_weight_bytes == 40
    assert delegated(graph, graph).npu_nodes == 0


@pytest.mark.parametrize(
    ("matrix", "byte", "mask"),
    [("model.layers.1.self_attn.k_proj", 3, 0x10), ("model.layers.0.mlp.up_proj", 0, 0x01)],
)
def test_one_flipped_nibble_is_found(
    matrix: str, byte: int, mask: int, written: Written, tmp_path: Path
) -> None:
    folder = copied(written, tmp_path)
    model = onnx.load_model(folder / "qdq" / "decode.onnx", load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == f"{matrix}.codes")
    offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    data = bytearray((folder / "qdq" / "model.data").read_bytes())
    data[offset + byte] ^= mask
    (folder / "qdq" / "model.data").write_bytes(data)
    with pytest.raises(ValidationFailed, match=matrix):
        container.check(written[0], folder)


def test_the_embedding_and_the_head_must_be_one(written: Written, tmp_path: Path) -> None:
    folder = copied(written, tmp_path)
    data = bytearray((folder / "tables.data").read_bytes())
    data[5] ^= 1
    (folder / "tables.data").write_bytes(data)
    with pytest.raises(BadInput, match="another matrix as the head"):
        container.check(written[0], folder)


def _other_block(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name.endswith("down_proj.weight"))
    next(entry for entry in node.attribute if entry.name == "block_size").i = 16


def _zero_point(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name.endswith("q_proj.weight"))
    node.input.append(node.input[1])


def _beyond(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(1 << 40)


def _huge(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.dims[0] = 1 << 40


def _elsewhere(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"


def _no_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


@pytest.mark.parametrize(
    "change", [_other_block, _zero_point, _beyond, _huge, _elsewhere, _no_nodes]
)
def test_hostile_graphs_are_refused(change: Change, written: Written, tmp_path: Path) -> None:
    folder = copied(written, tmp_path)
    changed(folder, change)
    with pytest.raises(BadInput):
        list(container.read_back(folder, written[0].decoder, written[0].grids))


def test_a_graph_with_other_weights_than_its_twin_is_refused(
    written: Written, tmp_path: Path
) -> None:
    def swap(model: onnx.ModelProto) -> None:
        nodes = {node.name: node for node in model.graph.node}
        key, value = (nodes[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "kv")
        key.input[0], value.input[0] = value.input[0], key.input[0]

    folder = copied(written, tmp_path)
    changed(folder, swap, "prefill")
    with pytest.raises(BadInput, match="another matrix in prefill"):
        list(container.read_back(folder, written[0].decoder, written[0].grids))


@pytest.mark.parametrize("name", ["qdq/decode.onnx", "qdq/model.data", "tables.data", "qnn.json"])
def test_missing_and_cut_files_are_refused(name: str, written: Written, tmp_path: Path) -> None:
    folder = copied(written, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput):
        list(container.read_back(folder, written[0].decoder, written[0].grids))
    (folder / name).unlink()
    with pytest.raises(BadInput):
        list(container.read_back(folder, written[0].decoder, written[0].grids))


def test_int4_bytes_may_span_rows() -> None:
    codes = np.array([[1, -2, 3], [-4, 5, 6]], np.int8)
    assert packing.pack(codes, INT4).tobytes() == bytes([0xE1, 0xC3, 0x65])


@given(arrays(np.int8, (5, 7), elements=st.integers(-8, 7)))
def test_int4_as_onnx_reads_it(codes: Any) -> None:
    packed = packing.pack(codes, INT4).tobytes()
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, packed, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)
    np.testing.assert_array_equal(
        reader._numbers(np.frombuffer(packed, np.uint8), 4, codes.size), codes.reshape(-1)
    )


def test_encodings_hold_zero_and_their_ends() -> None:
    held = encoding_of(-1.0, 3.0)
    ends = np.array([-1.0, 0.0, 3.0], np.float32)
    np.testing.assert_allclose(held.decode(held.encode(ends)), ends, atol=held.scale)
    assert held.decode(held.encode(np.zeros(1, np.float32)))[0] == 0
    assert held.encode(np.array([9.0], np.float32))[0] == 65535
    cache = encoding_of(-1.0, 3.0, cache=True)
    assert (cache.zero, cache.dtype) == (0, "int16")


def test_tensors_that_are_moved_share_an_encoding() -> None:
    found = Encodings({"a": (0.0, 1.0), "b": (-2.0, 0.0), "c": (0, 5)}, [("a", "b")], ["b"])
    assert found["a"] == found["b"] != found["c"]
    assert found["a"].dtype == "int16" and found["c"].dtype == "uint16"


def test_the_description_is_what_an_app_reads(written: Written) -> None:
    found = json.loads((written[1] / "qnn.json").read_text())
    assert (found["hexagon"], found["soc"], found["context"], found["chunk"]) == (
        *(73, "SM8550"),
        *(96, 64),
    )
    caches = {name for name in found["encodings"] if name.startswith(("past_", "new_"))}
    assert {found["encodings"][name]["dtype"] for name in caches} == {"int16"}
    for layer in range(2):  # a new key is the cache's own code
        for part in "kv":
            old, new = (found["encodings"][f"{age}_{part}_{layer}"] for age in ("past", "new"))
            assert old == new
