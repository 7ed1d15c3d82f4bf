"""Codes, scales and floats into the tensors of the data file, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig
from ...architectures.rotation import turns
from ...quantize import packing
from ...quantize.floats import exact_half, half
from ...quantize.grid import Float32, Grid, Int8
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..layout import Stored
from .layout import FLOAT16, FLOAT32, Float, block_of, blocks_of, zero_point

UInt8 = npt.NDArray[np.uint8]
_CHUNK = 1 << 21  # weights packed at a time
_FLIPS = {4: np.uint8(0x88), 8: np.uint8(0x80)}  # add half of the range to each code, modulo it


def parts(
    tensor: Stored, model: QuantizedCheckpoint, activations: Float = FLOAT32
) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor that is made of weights, some rows at a time.

    Raises:
        Unsupported: a float weight beyond float16, which is stored or computed with as such.
    """
    for choice in tensor.choices:
        weight = model.load(choice.weight.name)
        if isinstance(weight, np.ndarray):
            name = choice.weight.name
            halved = half(name, weight) if FLOAT16 in (tensor.dtype, activations) else None
            yield np.ascontiguousarray(weight if tensor.dtype != FLOAT16 else halved)
            continue
        assert isinstance(weight, QuantizedTensor), "layout refuses ggml's blocks"
        if tensor.part == "codes":
            yield from _codes(weight)
        elif tensor.part == "scale":
            yield _scales(weight)
        else:
            yield zero_points(weight)


def rope_parts(tensor: Stored, config: DecoderConfig) -> Iterator[Float32]:
    """A table of the rope: float32 (context, rotated / 2)."""
    _, index, which = tensor.name.split(".")
    cos, sin = turns(config.ropes[int(index)], config.head_dim, tensor.shape[0])
    yield sin if which == "sin" else cos


def pack(codes: Int8, grid: Grid) -> UInt8:
    """Codes (rows, columns) as uint8 (rows, bytes of a row), the last block filled up with zeros.

    A row 1, -2, 0 ... on int4-g32 starts with the nibbles 9, 6, 8: the bytes 0x69, 0x.8.
    """
    if grid.levels is not None:
        low_first = packing.pack(codes, grid.bits) ^ _FLIPS[grid.bits]
        return (low_first << np.uint8(4)) | (low_first >> np.uint8(4))
    codes = _filled(codes, grid)
    if grid.bits == 2:
        raised = (codes + np.int8(zero_point(grid))).view(np.uint8)
        return packing.join_pairs_of_bits(raised.reshape(len(codes), -1, 4))
    return packing.pack(codes, grid.bits) ^ _FLIPS[grid.bits]


def _filled(codes: Int8, grid: Grid) -> Int8:
    """With zeros up to the end of the last block."""
    columns = codes.shape[1]
    missing = blocks_of(grid, columns) * block_of(grid, columns) - columns
    return np.pad(codes, ((0, 0), (0, missing))) if missing else codes


def _codes(weight: QuantizedTensor) -> Iterator[UInt8]:
    rows, columns = weight.shape
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        if weight.grid.asymmetric:
            filled = _filled(weight.codes[part], weight.grid)
            counted, _ = QuantizedTensor(weight.grid, filled, weight.scale[part]).from_zero()
            yield packing.pack_unsigned(counted, weight.grid.bits)
        else:
            yield pack(weight.codes[part], weight.grid)


def _scales(weight: QuantizedTensor) -> npt.NDArray[Any]:
    rows, columns = weight.shape
    if weight.grid.levels is not None:
        return np.ascontiguousarray(weight.scale, "<f4")
    shape = (rows, blocks_of(weight.grid, columns))
    return np.ascontiguousarray(np.broadcast_to(exact_half(weight.scale), shape))


def zero_points(weight: QuantizedTensor) -> UInt8:
    """Zero points of every block: uint8 (rows, bytes)."""
    rows, columns = weight.shape
    if weight.grid.asymmetric:
        shape = (rows, blocks_of(weight.grid, columns))
        points = np.broadcast_to(weight.grid.zero_points(weight.codes), shape)
        return packing.pack_unsigned(points.astype(np.int8), weight.grid.bits)
    blocks, bits = blocks_of(weight.grid, columns), weight.grid.bits
    points = np.full((rows, -(-blocks * bits // 8) * 8 // bits), zero_point(weight.grid), np.uint8)
    return packing.join_pairs_of_bits(points.reshape(rows, -1, 4))
