import hashlib
import struct

import numpy as np
import pytest

from slimport.errors import BadInput
from slimport.quantize.grid import GRIDS, INT4_G32, INT8_ROW
from slimport.quantize.tensor import QuantizedTensor, weights_digest


def tensor():
    codes = np.arange(128, dtype=np.int8).reshape(2, 64) % 16 - 8
    return QuantizedTensor(INT4_G32, codes, np.float32([[1, 0.5], [0.25, 2]]))


def test_dequantize_a_hand_computed_block():
    values = tensor().dequantize()
    assert values.dtype == np.float32 and values.shape == (2, 64)
    assert values[0, :3].tolist() == [-8.0, -7.0, -6.0]
    assert values[0, 32:35].tolist() == [-4.0, -3.5, -3.0]
    assert values[1, 31] == 7 * 0.25 and values[1, 63] == 14.0


def test_one_scale_per_row():
    row = QuantizedTensor(INT8_ROW, np.int8([[1, -2, 127]]), np.float32([[0.5]]))
    assert row.dequantize().tolist() == [[0.5, -1.0, 63.5]]


def test_digest_by_hand():
    row = QuantizedTensor(INT8_ROW, np.int8([[1, -2]]), np.float32([[0.5]]))
    content = b"a.weight\nint8-row\n1 2\n" + b"\x01\xfe" + struct.pack("<f", 0.5)
    assert row.digest("a.weight") == hashlib.sha256(content).hexdigest()


def test_every_part_counts_in_the_digest():
    base = tensor()
    codes, scale = base.codes.copy(), base.scale.copy()
    codes[1, 63] ^= 1
    scale[0, 0] = 1.5
    digests = {
        base.digest("a"),
        base.digest("b"),
        QuantizedTensor(INT4_G32, codes, base.scale).digest("a"),
        QuantizedTensor(INT4_G32, base.codes, scale).digest("a"),
    }
    assert len(digests) == 4


def test_digest_does_not_depend_on_memory_order():
    base = tensor()
    other = QuantizedTensor(INT4_G32, np.asfortranarray(base.codes), base.scale)
    assert other.digest("a") == base.digest("a")


def test_weights_digest_is_sorted_by_name():
    expected = "sha256:" + hashlib.sha256(b"a 11\nb 22\n").hexdigest()
    assert weights_digest({"b": "22", "a": "11"}) == expected


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (np.zeros((2, 64), np.int8), np.ones((2, 1), np.float32)),
        (np.zeros((2, 40), np.int8), np.ones((2, 1), np.float32)),
        (np.zeros((2, 64), np.int16), np.ones((2, 2), np.float32)),
        (np.zeros((2, 64), np.int8), np.ones((2, 2), np.float64)),
    ],
)
def test_inconsistent_parts_are_refused(codes, scale):
    with pytest.raises(BadInput):
        QuantizedTensor(INT4_G32, codes, scale)


def test_codes_from_zero_by_hand():
    grid = GRIDS["uint4-g16"]
    codes = np.int8([[-3, 12, *[0] * 14]])
    tensor = QuantizedTensor(grid, codes, np.float32([[0.5]]))
    counted, zero_points = tensor.from_zero()
    assert counted[0, :3].tolist() == [0, 15, 3] and zero_points.tolist() == [[3]]
    assert tensor.dequantize()[0, :3].tolist() == [-1.5, 6.0, 0.0]
    codes[0, 2] = 13
    with pytest.raises(BadInput, match="codes from 0 to 16 do not fit into 4 bits"):
        tensor.from_zero()
