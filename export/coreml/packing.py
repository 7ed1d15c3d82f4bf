"""Codes, scales and floats into `weight.bin`, bit for bit: MIL's blob format, version 2.

64 bytes with the number of tensors and the version; then, at multiples of 64, a record of each
tensor (a mark, its type, its bytes, where they begin, and bits of padding at their end), and it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig
from ...architectures.rotation import turns
from ...quantize.blocks import BlockTensor
from ...quantize.floats import exact_half, half
from ...quantize.grid import GRIDS, Int8
from ...quantize.packing import join_pairs_of_bits, pack, pack_unsigned
from ...quantize.palette import PaletteTensor
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..layout import INT4, UINT2, UINT3, UINT4, UINT6, Layout, Stored
from .layout import HEAD, LEVELS, RECORD, ROPE, form_of

UInt8 = npt.NDArray[np.uint8]
_CHUNK = 1 << 21  # weights packed at a time
_MARK, _VERSION = 0xDEADBEEF, 2
_TYPES = {
    "<f2": 1,
    "<f4": 2,
    "|i1": 4,
    INT4: 8,
    UINT2: 10,
    UINT4: 11,
    UINT3: 12,
    UINT6: 13,
}  # of MIL's BlobDataType
_RAISE = np.uint8(0x88)  # adds 8 to both codes of a byte, modulo 16


def head(layout: Layout) -> bytes:
    """What the file begins with."""
    return struct.pack("<II", len(layout.tensors), _VERSION).ljust(HEAD, b"\0")


def data(
    model: QuantizedCheckpoint, layout: Layout, factors: Mapping[str, npt.NDArray[np.float16]]
) -> Iterator[tuple[str, int, Iterator[npt.NDArray[Any]]]]:
    """Name, bytes and content of every tensor, its record first.

    Args:
        factors: {name: numbers} of those of separate adapters.
    """
    for tensor in layout.tensors:
        content = iter([factors[tensor.name]]) if tensor.name in factors else parts(tensor, model)
        yield tensor.name, RECORD + tensor.nbytes, _recorded(tensor, content)


def _recorded(tensor: Stored, content: Iterator[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    values = (_MARK, _TYPES[tensor.dtype], tensor.nbytes, tensor.offset, tensor.unused_bits)
    record = struct.pack("<IIQQQ", *values).ljust(RECORD, b"\0")
    yield np.frombuffer(record, np.uint8)
    yield from content


def parts(tensor: Stored, model: QuantizedCheckpoint) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor, some rows at a time.

    Raises:
        Unsupported: a float matrix beyond float16.
    """
    if tensor.name.startswith(ROPE):
        yield _turned(tensor, model.decoder)
        return
    if not tensor.choices:
        yield _constant(tensor)
        return
    (choice,) = tensor.choices
    weight = model.load(choice.weight.name)
    if isinstance(weight, np.ndarray):
        halved = tensor.dtype == "<f2"
        yield half(choice.weight.name, weight) if halved else np.ascontiguousarray(weight, "<f4")
        return
    assert not isinstance(weight, BlockTensor), "layout refuses ggml's blocks"
    if isinstance(weight, PaletteTensor):
        if tensor.part == "levels":
            yield np.ascontiguousarray(weight.levels, tensor.dtype)
        else:
            yield from _palette_codes(weight)
        return
    if tensor.part == "scale":
        narrow = tensor.dtype == "<f2"
        yield np.ascontiguousarray(exact_half(weight.scale) if narrow else weight.scale)
        return
    if tensor.part == "zero_point":
        points = weight.grid.zero_points(weight.codes).view(np.int8)
        yield pack_unsigned(points.reshape(1, -1), weight.grid.bits)
        return
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        if weight.grid.asymmetric:
            rows = QuantizedTensor(weight.grid, weight.codes[part], weight.scale[part])
            yield pack_unsigned(rows.from_zero()[0], weight.grid.bits)
        else:
            yield packed(weight.codes[part], form_of(choice).codes)


def _palette_codes(weight: PaletteTensor) -> Iterator[UInt8]:
    """As one row: a row of its own need not end with a byte."""
    rows, columns = weight.shape
    step = max(8, _CHUNK // columns // 8 * 8)
    for start in range(0, rows, step):
        flat = np.ascontiguousarray(weight.codes[start : start + step]).reshape(1, -1)
        yield pack_unsigned(flat, weight.grid.bits)


def _constant(tensor: Stored) -> npt.NDArray[Any]:
    if tensor.name.startswith(LEVELS):
        levels = GRIDS[tensor.name.removeprefix(LEVELS)].levels
        return np.array(levels, tensor.dtype)
    return np.zeros(tensor.shape, tensor.dtype)


def _turned(tensor: Stored, config: DecoderConfig) -> npt.NDArray[Any]:
    """A table of the rope: (context, rotated / 2)."""
    _, index, which = tensor.name.split(".")
    pair = turns(config.ropes[int(index)], config.head_dim, tensor.shape[-2])
    return np.ascontiguousarray(pair[which == "sin"], tensor.dtype)


def packed(codes: Int8, dtype: str) -> UInt8:
    """Codes of some rows, low bits first; int4 in two's complement, indices from 0 on."""
    if dtype == UINT2:
        raised = (codes + np.int8(1)).view(np.uint8)
        return join_pairs_of_bits(raised.reshape(len(codes), -1, 4))
    if dtype == UINT3:
        return pack_unsigned(codes + np.int8(4), 3)
    if dtype == UINT4:
        return pack(codes, 4) ^ _RAISE
    return np.ascontiguousarray(pack(codes, 4 if dtype == INT4 else 8))
