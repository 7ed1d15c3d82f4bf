import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.quantize.packing import (
    pack,
    pack_unsigned,
    row_bytes,
    unpack,
    unpack_unsigned,
)


@settings(deadline=None)  # the first example compiles
@given(st.data(), st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 70))
def test_round_trip(data, bits, rows, columns):
    low, high = (-1, 2) if bits == 2 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    flat = st.lists(st.integers(low, high), min_size=rows * columns, max_size=rows * columns)
    codes = np.array(data.draw(flat), np.int8).reshape(rows, columns)
    packed = pack(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert np.array_equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("codes", "packed"),
    [
        ([[1, -2, 3]], [[0xE1, 0x03]]),
        ([[-8, 7], [7, -8]], [[0x78], [0x87]]),
        ([[-1, -1, -1, -1]], [[0xFF, 0xFF]]),
    ],
)
def test_bytes_by_hand(codes, packed):
    assert pack(np.int8(codes), 4).tolist() == packed


def test_three_bits_by_hand():
    # 1, 6, 2 and 4 are 1, -2, 2 and -4 modulo 8: 1 + 6 * 8 + 2 * 64 + 4 * 512
    assert pack(np.int8([[1, -2, 2, -4]]), 3).tolist() == [[0xB1, 0x08]]


def test_two_bits_by_hand():
    assert pack(np.int8([[1, -1, 2], [2, 0, -1]]), 2).tolist() == [[0b101101], [0b110010]]


def test_a_slice_of_columns_packs_like_its_copy():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    assert np.array_equal(pack(codes[:, 2:6], 4), pack(codes[:, 2:6].copy(), 4))
    assert np.array_equal(unpack(pack(codes, 4)[:, 1:3], 4, 4), codes[:, 2:6])


def test_eight_bits_are_the_codes_themselves():
    assert pack(np.int8([[-1, 127]]), 8).tolist() == [[0xFF, 0x7F]]


@settings(deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 5), st.integers(1, 70))
def test_round_trip_without_a_sign(data, bits, rows, columns):
    each = st.integers(0, (1 << bits) - 1)
    flat = st.lists(each, min_size=rows * columns, max_size=rows * columns)
    codes = np.array(data.draw(flat), np.int8).reshape(rows, columns)
    packed = pack_unsigned(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert np.array_equal(unpack_unsigned(packed, bits, columns), codes)
    for row, content in zip(codes, packed, strict=True):  # one number, low bits first
        number = sum(int(code) << bits * j for j, code in enumerate(row))
        assert int.from_bytes(content.tobytes(), "little") == number


def test_six_bits_by_hand():
    assert pack_unsigned(np.int8([[1, 2, 3], [63, 0, 63]]), 6).tolist() == [
        [0x81, 0x30, 0x00],
        [0x3F, 0xF0, 0x03],
    ]
