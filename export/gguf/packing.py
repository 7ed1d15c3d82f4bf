"""Codes and scales into ggml's blocks, bit for bit (block layouts: ggml's `ggml-common.h`).

Q4_0: an fp16 scale, then 16 bytes; byte j holds code j in its low and code 16 + j in its high
nibble, each plus 8. Q5_0: an fp16 scale, 4 bytes with the fifth bits of codes 0 .. 31, then 16
bytes as of Q4_0, each code plus 16. Q8_0: an fp16 scale, then 32 int8 codes. Q2_0: an fp16 scale,
then 16 bytes; byte j holds codes 4j .. 4j + 3, low bits first, each plus 1. TQ2_0: 64 bytes, then
an fp16 scale; of each half, byte j holds codes j, 32 + j, 64 + j and 96 + j, low bits first, each
plus 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig, Kind, Weight
from ...errors import Unsupported
from ...quantize.blocks import BlockTensor, Quantized
from ...quantize.compiled import compiled
from ...quantize.floats import exact_half, half
from ...quantize.ggml import BLOCKS, Type
from ...quantize.grid import LINEAR, Float32, Int8
from ...quantize.packing import join_pairs_of_bits
from ...quantize.tensor import QuantizedTensor
from .writer import TensorInfo

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
UInt64 = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]

_LINEAR = {"int4": Type.Q4_0, "uint4": Type.Q5_0, "int8": Type.Q8_0}
# A scale of more than 32 weights stands in each of their blocks.
TYPES = {
    **{name: _LINEAR[name.partition("-")[0]] for name, g in LINEAR.items() if g.group != 16},
    "int4-g32-signed": Type.Q4_0,
    "int2-g64": Type.Q2_0,
    "int2-g256": Type.TQ2_0,
}
_CHUNK = 1 << 21  # weights packed at a time by one thread


def pack(tensor: QuantizedTensor) -> UInt8:
    """The ggml blocks of a matrix: uint8 (rows, bytes per row), type `TYPES[tensor.grid.name]`.

    Raises:
        Unsupported: rows do not divide into blocks, or a scale is not exact in fp16.
    """
    rows, columns = tensor.shape
    kind = TYPES[tensor.grid.name]
    size = BLOCKS[kind][0]
    blocks = columns // size
    if columns % size:
        raise _not_blocks(columns, kind)
    half = exact_half(tensor.scale).view(np.uint16)
    half = np.repeat(half, blocks // half.shape[1], axis=1).reshape(-1)
    codes = np.ascontiguousarray(tensor.codes).reshape(rows * blocks, size)
    if kind in (Type.Q2_0, Type.TQ2_0):
        return _pack_two_bits(codes, half, kind).reshape(rows, -1)
    if kind is Type.Q5_0:
        return _pack_q5_0(codes, half).reshape(rows, -1)
    if kind is Type.Q4_0:
        packed = np.empty((rows * blocks, 9), "<u2")
        _pack_q4_0(codes.view("<u8"), half, packed)
    else:
        packed = np.empty((rows * blocks, 17), "<u2")
        _pack_q8_0(codes.view("<u2"), half, packed)
    return packed.view(np.uint8).reshape(rows, -1)


def packed_rows(tensor: Quantized, order: Index | None = None, threads: int = 2) -> Iterator[UInt8]:
    """`pack`, some rows at a time and `threads` of these at once; ggml's blocks as they are.

    Args:
        tensor: (rows, columns), columns divisible by the type's block.
        order: the source row that each row of the file holds; None keeps the order.
        threads: the bytes do not depend on it.
    """
    rows, columns = tensor.shape
    step = max(1, _CHUNK // columns)

    def chunk(start: int) -> UInt8:
        part = slice(start, start + step)
        taken = part if order is None else order[part]
        if isinstance(tensor, BlockTensor):
            return np.ascontiguousarray(tensor.blocks[taken])
        assert isinstance(tensor, QuantizedTensor), "layout refuses palettized grids"
        return pack(QuantizedTensor(tensor.grid, tensor.codes[taken], tensor.scale[taken]))

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(chunk, range(0, rows, step))


def row_order(weight: Weight, config: DecoderConfig) -> Index | None:
    """The source row held by each row of the file; None: as in the source.

    Hugging Face keeps the two halves of a rotary pair half a head apart, llama.cpp's `llama`
    keeps them side by side, in q and k alike.
    """
    if weight.kind not in (Kind.Q, Kind.K) or not config.family.interleaved_rope:
        return None
    halves = np.arange(weight.shape[0]).reshape(-1, 2, config.head_dim // 2)
    return halves.swapaxes(1, 2).reshape(-1)


def float_bytes(info: TensorInfo, weight: Float32, order: Index | None = None) -> npt.NDArray[Any]:
    """A weight without a grid, as F32 or rounded to F16.

    Raises:
        Unsupported: a weight is beyond fp16's largest number.
    """
    ordered = weight if order is None else weight[order]
    if info.type is Type.F32:
        return np.ascontiguousarray(ordered, "<f4")
    return half(info.name, ordered)


def _not_blocks(columns: int, kind: Type) -> Unsupported:
    return Unsupported(
        f"rows of {columns} codes do not divide into blocks of {BLOCKS[kind][0]}",
        f"{kind.name} shares one scale among {BLOCKS[kind][0]} weights of a row",
        "leave this weight in float16",
    )


def _pack_two_bits(codes: Int8, half: UInt16, kind: Type) -> UInt8:
    """codes (blocks, size) to uint8 (blocks, bytes)."""
    raised = (codes + 1).view(np.uint8)
    scale = half.view(np.uint8).reshape(-1, 2)
    if kind is Type.TQ2_0:
        raised = raised.reshape(len(codes), 2, 4, 32).swapaxes(2, 3)
    parts = raised.reshape(len(codes), -1, 4)
    joined = join_pairs_of_bits(parts)
    both = (scale, joined) if kind is Type.Q2_0 else (joined, scale)
    return np.concatenate(both, axis=1)


def _pack_q5_0(codes: Int8, half: UInt16) -> UInt8:
    """codes (blocks, 32) of -16 to 15 to uint8 (blocks, 22)."""
    raised = (codes + np.int8(16)).view(np.uint8)
    fifth = np.packbits(raised >> np.uint8(4), axis=1, bitorder="little")
    low = raised & np.uint8(15)
    nibbles = low[:, :16] | low[:, 16:] << np.uint8(4)
    return np.concatenate((half.view(np.uint8).reshape(-1, 2), fifth, nibbles), axis=1)


@compiled
def _pack_q4_0(codes: UInt64, half: UInt16, packed: UInt16) -> None:
    """Eight codes at a time: codes (blocks, 4), packed (blocks, 9).

    A code's four bits with the highest one flipped are the code plus 8.
    """
    nibbles, flip = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x8888888888888888)
    for block in range(codes.shape[0]):
        packed[block, 0] = half[block]
        for part in range(2):
            low, high = codes[block, part] & nibbles, codes[block, part + 2] & nibbles
            word = (low | (high << np.uint64(4))) ^ flip
            for i in range(4):
                packed[block, 1 + 4 * part + i] = word >> np.uint64(16 * i)


@compiled
def _pack_q8_0(codes: UInt16, half: UInt16, packed: UInt16) -> None:
    """Two codes at a time: codes (blocks, 16), packed (blocks, 17)."""
    for block in range(codes.shape[0]):
        packed[block, 0] = half[block]
        for i in range(16):
            packed[block, 1 + i] = codes[block, i]
