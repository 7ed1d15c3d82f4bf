"""The GGUF file format, version 3: metadata, tensor infos, aligned tensor data.

Written here and not with gguf's GGUFWriter, because the size of a file must be known to the byte
before anything is quantized, and because GGUFWriter drops empty values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf import GGUFValueType as ValueType

from ...quantize.ggml import BLOCKS, Type
from ..file import Parts, write_aligned

VERSION = 3
ALIGNMENT = 32

# int is u32, a list is an array of strings, and an array one of its own type.
Value = bool | int | float | str | list[str] | npt.NDArray[Any]

_ELEMENTS = {"|u1": ValueType.UINT8, "<i4": ValueType.INT32, "<f4": ValueType.FLOAT32}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's name.
        shape: rows first, as in numpy; the file stores it reversed.
        type: ggml's type.
    """

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        weights, size = BLOCKS[self.type]
        return math.prod(self.shape) // weights * size


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padded to where that starts."""
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for info in tensors:
        dimensions = info.shape[::-1]
        parts.append(_string(info.name))
        parts.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", info.type, offset))
        offset += _padded(info.nbytes)
    joined = b"".join(parts)
    return joined.ljust(_padded(len(joined)), b"\0")


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the file that `write_file` writes."""
    return len(header(metadata, tensors)) + sum(_padded(info.nbytes) for info in tensors)


def write_file(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorInfo],
    data: Iterable[Parts],
) -> None:
    """Write and fsync a file; `data` gives, for each tensor in order, its bytes in parts."""
    named = ((i.name, i.nbytes, parts) for i, parts in zip(tensors, data, strict=True))
    write_aligned(path, header(metadata, tensors), named, ALIGNMENT)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", ValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", ValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", ValueType.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, list):
        return _array(ValueType.STRING, len(value)) + b"".join(map(_string, value))
    return _array(_ELEMENTS[value.dtype.str], value.size) + value.tobytes()


def _array(kind: ValueType, count: int) -> bytes:
    return struct.pack("<IIQ", ValueType.ARRAY, kind, count)
