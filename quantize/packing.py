"""Codes to bytes and back: low bits first along the input dimension, two's complement.

At 2 bits a code is stored modulo 4, and read as one of -1, 0, 1, 2; at 3 bits modulo 8, and read as
one of -4 to 3. Codes of a palettized grid have no sign.
"""

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
    """Pack int8 codes (rows, columns) into uint8 (rows, row_bytes). `bits` is 2, 3, 4 or 8.

    At 4 bits a row 1, -2, 3 becomes the bytes 0xe1, 0x03; at 2 bits 1, -1, 2 becomes 0x2d.
    """
    if bits == 8:
        return codes.view(np.uint8)
    rows, columns = codes.shape
    if bits == 3:
        return pack_unsigned(codes & np.int8(7), bits)
    if bits == 2:
        whole = np.pad(codes, ((0, 0), (0, -columns % 4))).view(np.uint8) & np.uint8(3)
        return join_pairs_of_bits(whole.reshape(rows, -1, 4))
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    even = np.pad(codes, ((0, 0), (0, 1))) if columns % 2 else np.ascontiguousarray(codes)
    _pack_pairs(even.reshape(-1).view("<u2"), packed.reshape(-1))
    return packed


def unpack(packed: UInt8, bits: int, columns: int) -> Int8:
    """The inverse of `pack`: int8 codes (rows, columns)."""
    if bits == 8:
        return packed.view(np.int8)
    if bits == 3:
        return (unpack_unsigned(packed, bits, columns) ^ np.int8(4)) - np.int8(4)
    if bits == 2:
        codes = np.empty((*packed.shape, 4), np.int8)
        for place in range(4):
            stored = packed >> np.uint8(2 * place) & np.uint8(3)
            codes[:, :, place] = ((stored + np.uint8(1)) & np.uint8(3)).view(np.int8) - np.int8(1)
        return np.ascontiguousarray(codes.reshape(len(packed), -1)[:, :columns])
    pairs = np.empty(packed.shape, "<u2")
    _unpack_pairs(np.ascontiguousarray(packed).reshape(-1), pairs.reshape(-1))
    return np.ascontiguousarray(pairs.view(np.int8)[:, :columns])


def pack_unsigned(codes: Int8, bits: int) -> UInt8:
    """Pack codes (rows, columns) of 0 to 2 ** bits - 1, up to 7 bits, into uint8 (rows, row_bytes).

    At 6 bits a row 1, 2, 3 becomes the bytes 0x81, 0x30, 0x00: 1 + 2 * 2^6 + 3 * 2^12.
    """
    packed = np.zeros((len(codes), row_bytes(codes.shape[1], bits)), np.uint8)
    _pack_bits(codes, bits, packed)
    return packed


def unpack_unsigned(packed: UInt8, bits: int, columns: int) -> Int8:
    """The inverse of `pack_unsigned`: int8 codes (rows, columns)."""
    codes = np.empty((len(packed), columns), np.int8)
    _unpack_bits(packed, bits, codes)
    return codes


def join_pairs_of_bits(parts: UInt8) -> UInt8:
    """Four 2-bit numbers, uint8 (..., 4), to a byte (...), the first one lowest."""
    joined: UInt8 = np.bitwise_or.reduce(parts << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    return joined


@compiled
def _pack_pairs(pairs: UInt16, packed: UInt8) -> None:
    for i in range(pairs.size):
        packed[i] = (pairs[i] & 0x0F) | ((pairs[i] >> 4) & 0xF0)


@compiled
def _unpack_pairs(packed: UInt8, pairs: UInt16) -> None:
    for i in range(packed.size):
        nibbles = (packed[i] & 0x0F) | ((packed[i] & 0xF0) << 4)
        pairs[i] = nibbles | ((nibbles & 0x0808) * 0x1E)  # 8 * 0x1e = 0xf0: the sign, extended


@compiled
def _pack_bits(codes: Int8, bits: int, packed: UInt8) -> None:
    for row in range(codes.shape[0]):
        waiting, held, byte = np.int64(0), 0, 0
        for j in range(codes.shape[1]):
            waiting |= np.int64(codes[row, j]) << held
            held += bits
            if held >= 8:
                packed[row, byte] = waiting & 0xFF
                waiting >>= 8
                held -= 8
                byte += 1
        if held:
            packed[row, byte] = waiting


@compiled
def _unpack_bits(packed: UInt8, bits: int, codes: Int8) -> None:
    ones = (1 << bits) - 1
    for row in range(codes.shape[0]):
        waiting, held, byte = np.int64(0), 0, 0
        for j in range(codes.shape[1]):
            if held < bits:
                waiting |= np.int64(packed[row, byte]) << held
                held += 8
                byte += 1
            codes[row, j] = waiting & ones
            waiting >>= bits
            held -= bits
