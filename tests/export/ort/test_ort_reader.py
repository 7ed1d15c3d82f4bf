"""Damaged and hostile files: found, named, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, ValidationFailed
from slimport.export import flatbuffer
from slimport.export import ort as container
from slimport.export.container import Deployment
from slimport.export.layout import ALIGNMENT
from slimport.export.ort.reader import MODEL, at_accuracy_level, open_file
from slimport.export.ort.schema import SCHEMA
from slimport.tokenizer.tokenizer import Tokenizer

Change = Callable[[flatbuffer.Values], None]


@pytest.fixture(scope="module")
def written(tiny_llama: Path, in_memory: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    model = in_memory(tiny_llama)
    folder = tmp_path_factory.mktemp("written")
    container.write(model, Tokenizer.open(tiny_llama), folder, Deployment(64))
    return model, folder


def damaged(folder: Path, target: Path, values: Any, byte: int, mask: int) -> None:
    """A copy in which one byte of the array `values` is changed."""
    content = bytearray((folder / MODEL).read_bytes())
    assert content.count(values.tobytes()) == 1
    content[content.index(values.tobytes()) + byte] ^= mask
    (target / MODEL).write_bytes(content)


def changed(folder: Path, target: Path, change: Change) -> None:
    """A copy with other tables, and the tensors where they were."""
    content = (folder / MODEL).read_bytes()
    session = flatbuffer.decode(SCHEMA, content)
    graph = session["model"]["graph"]
    weights = [tensor for tensor in graph["initializers"] if len(tensor["raw_data"]) > 64]
    places = [content.index(tensor["raw_data"]) for tensor in weights]
    start = min(places) - ALIGNMENT
    for tensor, place in zip(weights, places, strict=True):
        tensor["raw_data"] = flatbuffer.Blob(place - start, len(tensor["raw_data"]))
    change(graph)
    (target / MODEL).write_bytes(flatbuffer.encode(SCHEMA, session, ALIGNMENT) + content[start:])


def operand(folder: Path, name: str) -> Any:
    found = open_file(folder).operand(name)
    assert found is not None
    return found


@pytest.mark.parametrize(("mask", "column"), [(0x01, 6), (0x10, 7)])
def test_one_flipped_nibble_is_found(
    mask: int, column: int, written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    # q, k and v are one matrix of 64 + 32 + 32 rows of 32 bytes: row 65 is row 1 of k.
    codes = operand(folder, "model.layers.1.self_attn.qkv_proj").codes
    damaged(folder, tmp_path, codes, 65 * 32 + 3, mask)
    with pytest.raises(ValidationFailed) as failure:
        container.check(model, tmp_path)
    assert "model.layers.1.self_attn.k_proj.weight" in failure.value.what
    assert f"codes [1, {column}] reads" in failure.value.why


def test_a_flipped_scale_and_a_changed_norm_are_found(
    written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    scale = operand(folder, "model.layers.0.mlp.up_proj").scale
    damaged(folder, tmp_path, scale, 2, 0x40)
    with pytest.raises(ValidationFailed, match="up_proj"):
        container.check(model, tmp_path)
    content = bytearray((folder / MODEL).read_bytes())
    norm = model.tensors["model.norm.weight"].tobytes()
    content[content.rindex(norm) + 2] ^= 0x10
    (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(ValidationFailed, match="norm"):
        container.check(model, tmp_path)


def _named(items: list[flatbuffer.Values], name: str) -> flatbuffer.Values:
    return next(item for item in items if item["name"] == name)


UP = "model.layers.0.mlp.up_proj"


def _attribute(graph: flatbuffer.Values, key: str, value: int) -> None:
    _named(_named(graph["nodes"], UP)["attributes"], key)["i"] = value


def _data(graph: flatbuffer.Values, raw: bytes) -> None:
    _named(graph["initializers"], UP + ".codes")["raw_data"] = raw


CHANGES: dict[str, Change] = {
    "another block": lambda g: _attribute(g, "block_size", 64),
    "other bits": lambda g: _attribute(g, "bits", 8),
    "no block": lambda g: _attribute(g, "block_size", 0),
    "g_idx": lambda g: _named(g["nodes"], UP)["inputs"].extend(["", "model.norm.weight"]),
    "no product": lambda g: g["nodes"].remove(_named(g["nodes"], UP)),
    "too short": lambda g: _data(g, b"abc"),
    "no data": lambda g: _named(g["initializers"], UP + ".codes").pop("raw_data"),
    "a huge shape": lambda g: _named(g["initializers"], UP + ".codes").update(dims=[2**62, 8]),
    "no shape": lambda g: _named(g["initializers"], UP + ".codes").update(dims=[]),
    "another type": lambda g: _named(g["initializers"], UP + ".codes").update(data_type=7),
    "two of a name": lambda g: g["initializers"].append(g["initializers"][0]),
    "two nodes of a name": lambda g: g["nodes"].append(g["nodes"][0]),
    "no text": lambda g: _named(g["nodes"], UP).update(name=b"\xff\xfe"),
    "too many inputs": lambda g: _named(g["nodes"], UP).update(inputs=[UP] * 100),
    "a long name": lambda g: _named(g["nodes"], UP).update(name="x" * 5000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_graph_that_does_something_else_is_refused(
    change: Change, written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    changed(folder, tmp_path, lambda graph: None)
    container.check(model, tmp_path)  # written again, it is what it was
    changed(folder, tmp_path, change)
    with pytest.raises(BadInput, match=r"^model\.ort is not the model"):
        dict(container.read_back(tmp_path, model.decoder, model.grids))


def test_names_that_stand_for_many_bytes_are_refused(
    written: tuple[Any, Path], tmp_path: Path
) -> None:
    """A name lies in the file once, however many inputs have it."""

    def swollen(graph: flatbuffer.Values) -> None:
        for number in range(200):
            inputs = [b"x" * 4000] * 60
            graph["nodes"].append({**graph["nodes"][0], "name": b"%d" % number, "inputs": inputs})

    model, folder = written
    changed(folder, tmp_path, swollen)
    with pytest.raises(BadInput) as failure:
        dict(container.read_back(tmp_path, model.decoder, model.grids))
    assert "Nodes have over" in failure.value.why


def test_a_missing_empty_cut_or_foreign_file_is_refused(
    written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = written
    with pytest.raises(BadInput, match=r"model\.ort"):
        container.check(model, tmp_path)
    content = (folder / MODEL).read_bytes()
    for other in (b"", b"ORTM", b"\0" * 64, content[:100], content[:-4096], content[4:]):
        (tmp_path / MODEL).write_bytes(other)
        with pytest.raises(BadInput, match=r"model\.ort"):
            container.check(model, tmp_path)


def test_the_accuracy_level_is_changed_and_nothing_else(written: tuple[Any, Path]) -> None:
    folder = written[1]
    before = (folder / MODEL).read_bytes()
    after = at_accuracy_level(folder / MODEL, 1)
    assert (folder / MODEL).read_bytes() == before and len(after) == len(before)
    old, new = flatbuffer.decode(SCHEMA, before), flatbuffer.decode(SCHEMA, after)
    products = [n for n in new["model"]["graph"]["nodes"] if n["op_type"] == "MatMulNBits"]
    levels = [_named(node["attributes"], "accuracy_level") for node in products]
    assert levels and {level["i"] for level in levels} == {1}
    for level in levels:
        level["i"] = 4
    assert new == old


Damage = list[tuple[float, int]]


@settings(max_examples=100, deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)
)
def test_damaged_tables_never_crash(damage: Damage, written: tuple[Any, Path]) -> None:
    model, folder = written
    content = bytearray((folder / MODEL).read_bytes())
    tables = content.index(operand(folder, "model.embed_tokens").codes.tobytes())
    for place, byte in damage:
        content[int(place * tables)] = byte
    target = folder.parent / "damaged-ort"
    target.mkdir(exist_ok=True)
    (target / MODEL).write_bytes(content)
    try:
        found = dict(container.read_back(target, model.decoder, model.grids))
    except BadInput:
        return
    assert all(np.asarray(getattr(tensor, "codes", tensor)).size for tensor in found.values())
