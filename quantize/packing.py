"""Codes to bytes and back: low bits first along the input dimension, two's complement."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .compiled import compiled
from .grid import Int8

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row; high bits of a last byte that is not full are zero."""
    return -(-columns * bits // 8)


def pack(codes: Int8, bits: int) -> UInt8:
    """Pack int8 codes (rows, columns) into uint8 (rows, row_bytes). `bits` is 4 or 8.

    At 4 bits a row 1, -2, 3 becomes the bytes 0xe1, 0x03.
    """
    if bits == 8:
        return codes.view(np.uint8)
    rows, columns = codes.shape
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    even = np.pad(codes, ((0, 0), (0, 1))) if columns % 2 else np.ascontiguousarray(codes)
    _pack_pairs(even.reshape(-1).view("<u2"), packed.reshape(-1))
    return packed


def unpack(packed: UInt8, bits: int, columns: int) -> Int8:
    """The inverse of `pack`: int8 codes (rows, columns)."""
    if bits == 8:
        return packed.view(np.int8)
    pairs = np.empty(packed.shape, "<u2")
    _unpack_pairs(np.ascontiguousarray(packed).reshape(-1), pairs.reshape(-1))
    return np.ascontiguousarray(pairs.view(np.int8)[:, :columns])


@compiled
def _pack_pairs(pairs: UInt16, packed: UInt8) -> None:
    for i in range(pairs.size):
        packed[i] = (pairs[i] & 0x0F) | ((pairs[i] >> 4) & 0xF0)


@compiled
def _unpack_pairs(packed: UInt8, pairs: UInt16) -> None:
    for i in range(packed.size):
        nibbles = (packed[i] & 0x0F) | ((packed[i] & 0xF0) << 4)
        pairs[i] = nibbles | ((nibbles & 0x0808) * 0x1E)  # 8 * 0x1e = 0xf0: the sign, extended
