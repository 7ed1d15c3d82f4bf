"""Damaged and hostile files: found, named, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.errors import BadInput, ValidationFailed
from slimport.export import gguf
from slimport.export.gguf.reader import open_gguf
from slimport.quantize.tensor import QuantizedTensor
from slimport.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def written(tiny_llama: Path, in_memory: Any, tmp_path_factory: Any) -> tuple[Any, bytes]:
    model = in_memory(tiny_llama)
    (file,) = gguf.write(model, Tokenizer.open(tiny_llama), tmp_path_factory.mktemp("written"))
    return model, file.read_bytes()


def place_of(data: bytes, name: str, folder: Path) -> slice:
    """Where the bytes of a tensor stand."""
    (folder / "model.gguf").write_bytes(data)
    stored = open_gguf(folder / "model.gguf").tensors[name]
    start = data.index(stored.rows.tobytes())
    return slice(start, start + stored.rows.nbytes)


def damaged(data: bytes, position: int, mask: int, folder: Path) -> Path:
    changed = bytearray(data)
    changed[position] ^= mask
    (folder / "model.gguf").write_bytes(changed)
    return folder


@pytest.mark.parametrize("mask", [0x01, 0x10])
def test_one_flipped_nibble_is_found(mask: int, written: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = written
    place = place_of(data, "blk.1.attn_k.weight", tmp_path)
    damaged(data, place.start + 18 * 2 + 5, mask, tmp_path)  # row 1, block 0, byte 3 of its codes
    # Row 1 of the file is row 8 of the source: the second half of a head of 16.
    column = 3 if mask == 0x01 else 19
    with pytest.raises(ValidationFailed) as failure:
        gguf.check(model, tmp_path)
    assert "model.layers.1.self_attn.k_proj.weight" in failure.value.what
    assert f"codes [8, {column}] reads" in failure.value.why
    found = dict(gguf.read_back(tmp_path, model.decoder, model.grids))
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = found[name]
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.digest(name) != model.tensors[name].digest(name)


def test_a_flipped_scale_is_found(written: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = written
    place = place_of(data, "blk.0.ffn_up.weight", tmp_path)
    damaged(data, place.start + 1, 0x04, tmp_path)
    with pytest.raises(ValidationFailed, match="up_proj"):
        gguf.check(model, tmp_path)


def test_a_row_scale_that_is_not_repeated_is_found(
    written: tuple[Any, bytes], tmp_path: Path
) -> None:
    model, data = written
    place = place_of(data, "token_embd.weight", tmp_path)
    damaged(data, place.start + 68 * 3 + 34, 0x80, tmp_path)  # row 3, block 1
    with pytest.raises(BadInput, match="row 3 has another scale in block 1"):
        gguf.check(model, tmp_path)


def test_a_changed_norm_is_found(written: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = written
    place = place_of(data, "output_norm.weight", tmp_path)
    damaged(data, place.start + 4 * 9, 0x01, tmp_path)  # the last bit of a float32
    with pytest.raises(ValidationFailed, match=r"model\.norm\.weight"):
        gguf.check(model, tmp_path)


def test_no_flipped_bit_of_the_data_goes_unseen(written: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = written
    (tmp_path / "model.gguf").write_bytes(data)
    tensors = open_gguf(tmp_path / "model.gguf").tensors.values()
    generator = np.random.default_rng(0)
    for stored in tensors:
        place = place_of(data, stored.name, tmp_path)
        position = int(generator.integers(place.start, place.stop))
        damaged(data, position, 1 << int(generator.integers(8)), tmp_path)
        with pytest.raises((BadInput, ValidationFailed)):
            gguf.check(model, tmp_path)


def test_the_grids_must_be_those_of_the_file(written: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = written
    (tmp_path / "model.gguf").write_bytes(data)
    name = "model.layers.0.mlp.up_proj.weight"
    for grid in ("int8-g32", "nf4-g64", None):
        grids = {key: value for key, value in {**model.grids, name: grid}.items() if value}
        with pytest.raises(BadInput, match="ffn_up"):
            list(gguf.read_back(tmp_path, model.decoder, grids))


def test_another_decoder_is_refused(
    written: tuple[Any, bytes], make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    _, data = written
    (tmp_path / "model.gguf").write_bytes(data)
    for overrides, why in (
        ({"num_hidden_layers": 1}, "unexpected"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"intermediate_size": 128}, "shape"),
    ):
        config = in_memory(make_model("llama", **overrides)).decoder
        with pytest.raises(BadInput, match=why):
            list(gguf.read_back(tmp_path, config, {}))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def info(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def file_of(
    pairs: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
) -> bytes:
    counted = counts or (len(infos), len(pairs))
    head = start + struct.pack("<QQ", *counted) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(128)


HUGE = 2**62
KEY = text("key")
HOSTILE = {
    "empty": b"",
    "only the magic": b"GGUF",
    "another format": file_of(start=b"PK\3\4\3\0\0\0"),
    "big endian": file_of(start=b"GGUF\0\0\0\3"),
    "version 2": file_of(start=b"GGUF\2\0\0\0"),
    "huge tensor count": file_of(infos=(info(),), counts=(HUGE, 0)),
    "huge key count": file_of(pairs=(KEY + struct.pack("<IB", 0, 1),), counts=(0, HUGE)),
    "huge key": file_of(pairs=(struct.pack("<Q", HUGE),)),
    "huge string": file_of(pairs=(KEY + struct.pack("<IQ", 8, HUGE),)),
    "huge array": file_of(pairs=(KEY + struct.pack("<IIQ", 9, 12, HUGE),)),
    "huge array of strings": file_of(pairs=(KEY + struct.pack("<IIQ", 9, 8, HUGE),)),
    "array of arrays": file_of(pairs=(KEY + struct.pack("<IIQ", 9, 9, 1),)),
    "unknown value type": file_of(pairs=(KEY + struct.pack("<I", 13),)),
    "key twice": file_of(pairs=(KEY + struct.pack("<IB", 0, 1),) * 2),
    "not UTF-8": file_of(pairs=(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1),)),
    "no dimensions": file_of(infos=(info(shape=()),)),
    "five dimensions": file_of(infos=(info(shape=(1,) * 5),)),
    "a dimension of zero": file_of(infos=(info(shape=(0, 4)),)),
    "huge dimensions": file_of(infos=(info(shape=(HUGE, HUGE)),)),
    "unknown tensor type": file_of(infos=(info(kind=99),)),
    "half a block": file_of(infos=(info(shape=(16,), kind=2),)),
    "not aligned": file_of(infos=(info(shape=(4,), offset=8),)),
    "beyond the end": file_of(infos=(info(offset=32),)),
    "far beyond the end": file_of(infos=(info(offset=2**64 - 32),)),
    "overlapping": file_of(infos=(info(shape=(16,)), info("b", (16,), offset=32))),
    "tensor twice": file_of(infos=(info(shape=(8,)), info(shape=(8,), offset=32))),
    "alignment 0": file_of(pairs=(text("general.alignment") + struct.pack("<II", 4, 0),)),
    "alignment 24": file_of(pairs=(text("general.alignment") + struct.pack("<II", 4, 24),)),
    "alignment in words": file_of(
        pairs=(text("general.alignment") + struct.pack("<I", 8) + text("32"),), infos=(info(),)
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_bad_input(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(BadInput):
        open_gguf(path)


def test_the_hostile_cases_start_from_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(pairs=(KEY + struct.pack("<IB", 0, 7),), infos=(info(),)))
    file = open_gguf(path)
    assert file.metadata == {"key": 7}
    assert file.tensors["a"].shape == (32,)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        open_gguf(tmp_path / "model.gguf")


def test_a_truncated_file_is_bad_input(written: tuple[Any, bytes], tmp_path: Path) -> None:
    _, data = written
    path = tmp_path / "model.gguf"
    for length in [*range(0, 200), *range(200, len(data) - 32, 2003)]:
        path.write_bytes(data[:length])
        with pytest.raises(BadInput):
            open_gguf(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 20_000), value=st.integers(1, 255))
def test_a_changed_byte_never_crashes_the_reader(
    written: tuple[Any, bytes], tmp_path_factory: Any, position: int, value: int
) -> None:
    model, data = written
    folder = tmp_path_factory.getbasetemp()
    damaged(data, position, value, folder)
    try:
        list(gguf.read_back(folder, model.decoder, model.grids))
    except BadInput:
        pass
