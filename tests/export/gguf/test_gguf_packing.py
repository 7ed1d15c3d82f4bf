from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slimport.errors import BadInput, Unsupported
from slimport.export.gguf import packing, reader
from slimport.export.gguf.reader import Stored
from slimport.export.gguf.writer import TensorInfo
from slimport.quantize.ggml import BLOCKS, Type, dequantize_rows
from slimport.quantize.grid import GRIDS, SCALE_CEILING, SCALE_FLOOR, Grid, round_scale
from slimport.quantize.tensor import QuantizedTensor


@st.composite
def tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Any grid, codes anywhere on it, scales from the floor to the ceiling, all-zero groups."""
    grid = GRIDS[draw(st.sampled_from(sorted(packing.TYPES)))]
    size = max(BLOCKS[packing.TYPES[grid.name]][0], grid.group or 0)
    rows, columns = draw(st.integers(1, 5)), size * draw(st.integers(1, 4))
    shape = (rows, grid.groups(columns))
    codes = draw(arrays.arrays(np.int8, (rows, columns), elements=st.integers(grid.low, grid.high)))
    if grid.asymmetric:  # anywhere, but in each group within a window that holds 0
        zero = draw(arrays.arrays(np.int8, shape, elements=st.integers(0, 15)))
        groups = codes.reshape(*shape, -1)
        np.clip(groups, -zero[:, :, None], 15 - zero[:, :, None], out=groups)
    smallest = -SCALE_CEILING if grid.signed_scale else SCALE_FLOOR
    sizes = st.floats(smallest, SCALE_CEILING, width=32)
    scale = round_scale(draw(arrays.arrays(np.float32, shape, elements=sizes)))
    if draw(st.booleans()):
        codes[-1], scale[-1] = 0, 1
    return QuantizedTensor(grid, codes, scale)


def unpacked(packed: packing.UInt8, grid: Grid, shape: tuple[int, int]) -> QuantizedTensor:
    stored = Stored("a", Type(packing.TYPES[grid.name]), shape, packed)
    return reader.unpack_rows(Path("a.gguf"), stored, np.arange(shape[0]), grid)


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_the_reader_finds_what_was_packed(tensor: QuantizedTensor) -> None:
    found = unpacked(packing.pack(tensor), tensor.grid, tensor.shape)
    np.testing.assert_array_equal(found.codes, tensor.codes)
    np.testing.assert_array_equal(found.scale, tensor.scale)


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_ggml_and_gguf_dequantize_to_code_times_scale(tensor: QuantizedTensor) -> None:
    kind = packing.TYPES[tensor.grid.name]
    packed = packing.pack(tensor)
    expected = tensor.dequantize()
    np.testing.assert_array_equal(dequantize_rows(kind, packed, tensor.shape[1]), expected)
    if kind.name in gguf.GGMLQuantizationType.__members__:
        upstream = gguf.GGMLQuantizationType(kind)
        np.testing.assert_array_equal(gguf.dequantize(packed, upstream), expected)


def test_a_q4_0_block_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, :3] = -8, 7, -1  # low nibbles of bytes 0, 1, 2: 0, 15, 7
    codes[0, 16:19] = 1, -8, 0  # their high nibbles: 9, 0, 8
    tensor = QuantizedTensor(GRIDS["int4-g32"], codes, np.array([[0.5]], np.float32))
    expected = "0038" + "900f87" + "88" * 13  # 0.5 is 0x3800 in fp16, stored low byte first
    assert packing.pack(tensor).tobytes().hex() == expected


def test_a_q8_0_row_by_hand_repeats_its_scale() -> None:
    codes = np.zeros((1, 64), np.int8)
    codes[0, 0], codes[0, 31], codes[0, 32] = 127, -127, -1
    tensor = QuantizedTensor(GRIDS["int8-row"], codes, np.array([[-2.0]], np.float32))
    expected = "00c0" + "7f" + "00" * 30 + "81" + "00c0" + "ff" + "00" * 31
    assert packing.pack(tensor).tobytes().hex() == expected


def test_a_q2_0_block_by_hand() -> None:
    codes = np.zeros((1, 64), np.int8)
    codes[0, :4] = -1, 0, 1, 2  # byte 0: 0, 1, 2, 3 from the lowest bits on
    codes[0, 63] = 2  # the highest bits of the last byte
    tensor = QuantizedTensor(GRIDS["int2-g64"], codes, np.array([[0.5]], np.float32))
    assert packing.pack(tensor).tobytes().hex() == "0038" + "e4" + "55" * 14 + "d5"


def test_a_tq2_0_block_by_hand() -> None:
    codes = np.zeros((1, 256), np.int8)
    codes[0, [0, 32, 64, 96]] = -1, 0, 1, 2  # byte 0: 0, 1, 2, 3 from the lowest bits on
    codes[0, 255] = 2  # the highest bits of the last byte
    tensor = QuantizedTensor(GRIDS["int2-g256"], codes, np.array([[0.5]], np.float32))
    assert packing.pack(tensor).tobytes().hex() == "e4" + "55" * 62 + "d5" + "0038"


def test_a_q5_0_block_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, :3] = -15, 15, -1  # plus 16: 1, 31, 15
    codes[0, 16:18] = 1, -8  # 17, 8
    tensor = QuantizedTensor(GRIDS["uint4-row"], codes, np.array([[0.5]], np.float32))
    # Fifth bits of 0 .. 31, low bits first: not of codes 0, 2 and 17.
    expected = "0038" + "fafffdff" + "118f0f" + "00" * 13
    assert packing.pack(tensor).tobytes().hex() == expected


def test_a_scale_of_128_weights_stands_in_four_blocks() -> None:
    codes = np.full((1, 256), 7, np.int8)
    tensor = QuantizedTensor(GRIDS["int4-g128-f16"], codes, np.float32([[1 + 2**-10, -2]]))
    packed = packing.pack(tensor).reshape(8, 18)
    assert [block[:2].tobytes().hex() for block in packed] == ["013c"] * 4 + ["00c0"] * 4
    packed[2, 0] ^= 1
    with pytest.raises(BadInput, match="row 0 has another scale in block 2 than in block 0"):
        unpacked(packed.reshape(1, -1), tensor.grid, tensor.shape)


SOME = ("int2-g256", "int2-g64", "int4-g128-f16", "int4-g32", "int8-row", "uint4-g64", "uint4-row")


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("grid", SOME)
def test_parts_join_to_the_whole(grid: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows at a time, so a last part of one row.
    generator = np.random.default_rng(rows)
    size = max(BLOCKS[packing.TYPES[grid]][0], GRIDS[grid].group or 0)
    monkeypatch.setattr(packing, "_CHUNK", 2 * size)
    codes = generator.integers(-1, 3, (rows, size), dtype=np.int8)
    scale = np.full((rows, GRIDS[grid].groups(size)), 0.25, np.float32)
    tensor = QuantizedTensor(GRIDS[grid], codes, scale)
    order = generator.permutation(rows)
    parts = list(packing.packed_rows(tensor, order))
    np.testing.assert_array_equal(np.concatenate(parts), packing.pack(tensor)[order])


def test_an_inexact_scale_is_refused() -> None:
    codes = np.ones((1, 32), np.int8)
    for scale in (0.1, 1e-6, 1e6):
        tensor = QuantizedTensor(GRIDS["int4-g32"], codes, np.array([[scale]], np.float32))
        with pytest.raises(Unsupported, match="not exact in fp16"):
            packing.pack(tensor)


def test_rows_of_broken_blocks_are_refused() -> None:
    codes = np.ones((1, 172), np.int8)
    tensor = QuantizedTensor(GRIDS["int8-row"], codes, np.ones((1, 1), np.float32))
    with pytest.raises(Unsupported, match="172"):
        packing.pack(tensor)


def test_float16_keeps_what_it_can_and_refuses_the_rest() -> None:
    info = TensorInfo("output.weight", (1, 2), Type.F16)
    assert packing.float_bytes(info, np.array([[65504, 0.5]], np.float32)).tolist() == [
        [65504, 0.5]
    ]
    for beyond in (65505, -1e30, np.inf, np.nan):
        with pytest.raises(Unsupported, match=r"output\.weight"):
            packing.float_bytes(info, np.array([[beyond, 1]], np.float32))
