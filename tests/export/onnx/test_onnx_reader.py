"""Damaged and hostile folders: found, named, never a crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, ValidationFailed
from slimport.export import onnx as container
from slimport.export.container import Deployment
from slimport.export.onnx.reader import DATA, MODEL
from slimport.tokenizer.tokenizer import Tokenizer

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def written(tiny_llama: Path, in_memory: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    model = in_memory(tiny_llama)
    folder = tmp_path_factory.mktemp("written")
    container.write(model, Tokenizer.open(tiny_llama), folder, Deployment(64))
    return model, folder


def damaged(folder: Path, target: Path, tensor: str, byte: int, mask: int) -> Path:
    """A copy in which one byte of a stored tensor is changed."""
    for name in (MODEL, DATA):
        shutil.copyfile(folder / name, target / name)
    model = onnx.load_model(target / MODEL, load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.name == tensor)
    offset = int({e.key: e.value for e in entry.external_data}["offset"])
    data = bytearray((target / DATA).read_bytes())
    data[offset + byte] ^= mask
    (target / DATA).write_bytes(data)
    return target


def changed(folder: Path, target: Path, change: Change) -> Path:
    """A copy with another graph."""
    shutil.copyfile(folder / DATA, target / DATA)
    model = onnx.load_model(folder / MODEL, load_external_data=False)
    change(model)
    (target / MODEL).write_bytes(model.SerializeToString())
    return target


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


@pytest.mark.parametrize(("mask", "column"), [(0x01, 6), (0x10, 7)])
def test_one_flipped_nibble_is_found(
    mask: int, column: int, written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    # q, k and v are one matrix of 64 + 32 + 32 rows of 32 bytes: row 65 is row 1 of k.
    damaged(folder, tmp_path, "model.layers.1.self_attn.qkv_proj.codes", 65 * 32 + 3, mask)
    with pytest.raises(ValidationFailed) as failure:
        container.check(model, tmp_path)
    assert "model.layers.1.self_attn.k_proj.weight" in failure.value.what
    assert f"codes [1, {column}] reads" in failure.value.why


def test_a_flipped_scale_is_found(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = written
    damaged(folder, tmp_path, "model.layers.0.mlp.up_proj.scale", 1, 0x04)
    with pytest.raises(ValidationFailed, match="up_proj"):
        container.check(model, tmp_path)


def test_a_changed_norm_is_found(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = written
    damaged(folder, tmp_path, "model.norm.weight", 2, 0x10)
    with pytest.raises(ValidationFailed, match=r"model\.norm\.weight"):
        container.check(model, tmp_path)


def _attribute(model: onnx.ModelProto, name: str, key: str, value: int) -> None:
    for attribute in node(model, name).attribute:
        if attribute.name == key:
            attribute.i = value


def _moved(model: onnx.ModelProto, key: str, value: str) -> None:
    entry = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    next(e for e in entry.external_data if e.key == key).value = value


def _with_g_idx(model: onnx.ModelProto) -> None:
    product = node(model, "model.layers.0.mlp.up_proj")
    product.input.extend(["", "model.norm.weight"])


def _without_up(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node(model, "model.layers.0.mlp.up_proj"))


def _resized(model: onnx.ModelProto) -> None:
    entry = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    entry.dims[0] = 2**40


def _in_a_circle(model: onnx.ModelProto) -> None:
    cast = node(model, "model.layers.0.mlp.up_proj.scale.float32")
    cast.input[0] = cast.output[0]


def _without_inputs(name: str) -> Change:
    return lambda model: node(model, name).ClearField("input")


CHANGES: dict[str, Change] = {
    "a circle of casts": _in_a_circle,
    "a cast of nothing": _without_inputs("model.layers.0.mlp.up_proj.scale.float32"),
    "a lookup of nothing": _without_inputs("model.embed_tokens.rows"),
    "a norm of nothing": _without_inputs("model.norm"),
    "another block": lambda m: _attribute(m, "model.layers.0.mlp.up_proj", "block_size", 64),
    "other bits": lambda m: _attribute(m, "model.layers.0.mlp.up_proj", "bits", 8),
    "no block": lambda m: _attribute(m, "model.layers.0.mlp.up_proj", "block_size", 0),
    "g_idx": _with_g_idx,
    "no product": _without_up,
    "beyond the end": lambda m: _moved(m, "offset", "99999999"),
    "before the start": lambda m: _moved(m, "offset", "-64"),
    "no number": lambda m: _moved(m, "offset", "x"),
    "another file": lambda m: _moved(m, "location", "../model.onnx.data"),
    "a huge shape": _resized,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_graph_that_does_something_else_is_refused(
    change: Change, written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    changed(folder, tmp_path, change)
    with pytest.raises(BadInput, match=r"model\.onnx"):
        dict(container.read_back(tmp_path, model.decoder, model.grids))


def test_zero_points_of_another_shape_are_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    """A row of them would be taken for all rows."""
    model = in_memory(tiny_llama, patterns={"*.layers.*": "int2-g64"})
    written = tmp_path / "written"
    written.mkdir()
    container.write(model, Tokenizer.open(tiny_llama), written, Deployment(64))

    def one_row(graph: onnx.ModelProto) -> None:
        name = "model.layers.0.mlp.up_proj.zero_point"
        tensor = next(t for t in graph.graph.initializer if t.name == name)
        tensor.dims[0] = 1
        length = next(entry for entry in tensor.external_data if entry.key == "length")
        length.value = str(tensor.dims[1])

    changed(written, tmp_path, one_row)
    with pytest.raises(BadInput, match=r"model\.onnx"):
        dict(container.read_back(tmp_path, model.decoder, model.grids))


def test_a_tied_head_must_read_the_same_bytes(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = written

    def other(graph: onnx.ModelProto) -> None:
        node(graph, "model.embed_tokens").input[2] = "model.layers.0.mlp.up_proj.scale.float32:0"

    changed(folder, tmp_path, other)
    with pytest.raises(BadInput, match="another matrix as the head"):
        dict(container.read_back(tmp_path, model.decoder, model.grids))


def test_a_grid_that_was_not_written_is_refused(written: tuple[Any, Path]) -> None:
    model, folder = written
    grids = model.grids | {"model.layers.0.mlp.up_proj.weight": "int8-g32"}
    with pytest.raises(BadInput, match="not on the grid int8-g32"):
        dict(container.read_back(folder, model.decoder, grids))


def test_a_missing_or_cut_data_file_is_refused(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = written
    shutil.copyfile(folder / MODEL, tmp_path / MODEL)
    with pytest.raises(BadInput, match="cannot be read"):
        container.check(model, tmp_path)
    (tmp_path / DATA).write_bytes((folder / DATA).read_bytes()[:-4096])
    with pytest.raises(BadInput, match="ends at"):
        container.check(model, tmp_path)


Damage = list[tuple[float, int]]


@settings(max_examples=100, deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)
)
def test_a_damaged_model_file_never_crashes(damage: Damage, written: tuple[Any, Path]) -> None:
    model, folder = written
    content = bytearray((folder / MODEL).read_bytes())
    for place, byte in damage:
        content[int(place * len(content))] = byte
    target = folder.parent / "damaged"
    target.mkdir(exist_ok=True)
    shutil.copyfile(folder / DATA, target / DATA)
    (target / MODEL).write_bytes(content)
    try:
        found = dict(container.read_back(target, model.decoder, model.grids))
    except BadInput:
        return
    assert all(np.asarray(getattr(tensor, "codes", tensor)).size for tensor in found.values())
