"""Codes, scales and floats into the tensors of the file, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig
from ...architectures.rotation import turns
from ...quantize.floats import half
from ...quantize.grid import Float32, Int8
from ...quantize.packing import pack
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..layout import Stored
from .embedding import LOOKUP, ZERO
from .layout import BFLOAT16, NUMBER, POSITIONS, ROPE

UInt8 = npt.NDArray[np.uint8]
_CHUNK = 1 << 21  # weights packed at a time
_RAISE = np.uint8(0x88)  # adds 8 to both codes of a byte, modulo 16


def parts(tensor: Stored, model: QuantizedCheckpoint) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor, some rows at a time."""
    if tensor.name.startswith(NUMBER):
        yield np.array([float(tensor.name.removeprefix(NUMBER))], "<f4")
        return
    if tensor.name == POSITIONS:
        yield np.arange(tensor.shape[0], dtype="<f4")
        return
    if tensor.name.startswith(ROPE):
        yield _turned(tensor, model.decoder)
        return
    (choice,) = tensor.choices
    weight = model.load(choice.weight.name)
    if isinstance(weight, np.ndarray):
        yield np.ascontiguousarray(
            half(choice.weight.name, weight) if tensor.dtype == "<f2" else weight
        )
        return
    assert isinstance(weight, QuantizedTensor), "layout refuses ggml's blocks"
    if tensor.part == "zero_point":
        yield np.full(tensor.shape, ZERO, "<f4")
        return
    if tensor.part == "scale":
        yield _scales(weight.scale, tensor.dtype)
        return
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield _codes(weight.codes[start : start + step], weight.grid.bits, LOOKUP in tensor.name)


def _turned(tensor: Stored, config: DecoderConfig) -> Float32:
    """A table of the rope: float32 (context, 1, rotated / 2)."""
    _, index, which = tensor.name.split(".")
    cos, sin = turns(config.ropes[int(index)], config.head_dim, tensor.shape[0])
    return cos if which == "cos" else sin


def _codes(codes: Int8, bits: int, high_first: bool) -> UInt8:
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint8)
    if bits == 2:
        return _raised(pack(codes, bits))
    packed = pack(codes, bits) ^ _RAISE
    return (packed << np.uint8(4)) | (packed >> np.uint8(4)) if high_first else packed


def _raised(packed: UInt8) -> UInt8:
    """Four numbers of 2 bits to a byte, each one more, modulo 4."""
    low = ~packed & np.uint8(0x55)
    return low | ((packed ^ (packed << np.uint8(1))) & np.uint8(0xAA))


def _scales(scale: Float32, dtype: str) -> npt.NDArray[Any]:
    if dtype != BFLOAT16:
        return np.ascontiguousarray(scale, "<f4")
    bits = np.ascontiguousarray(scale, "<f4").view("<u4")
    assert not (bits & 0xFFFF).any(), "a scale has 8 significant bits"
    return (bits >> 16).astype(BFLOAT16)
