"""The weight file of a package, read by our own code and by Apple's library.

MIL's blob format, version 2: a record at a multiple of 64 bytes, behind it the bits of a tensor,
the first number in the lowest bits of the first byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .proto import blob_library, messages

_FILE = "@model_path/weights/weight.bin"
_MARK, _VERSION, _ALIGNMENT = 0xDEADBEEF, 2, 64


@dataclass(frozen=True, slots=True)
class Type:
    """A type of tensors: its number in the weight file, its bits, and Apple's reader of it."""

    number: int
    bits: int
    numpy: str
    read: str


TYPES = {
    "FLOAT16": Type(1, 16, "<f2", "read_fp16_data"),
    "FLOAT32": Type(2, 32, "<f4", "read_float_data"),
    "INT8": Type(4, 8, "|i1", "read_int8_data"),
    "INT4": Type(8, 4, "|i1", "read_int4_data"),
    "UINT2": Type(10, 2, "|u1", "read_uint2_data"),
    "UINT4": Type(11, 4, "|u1", "read_uint4_data"),
    "UINT3": Type(12, 3, "|u1", "read_uint3_data"),
    "UINT6": Type(13, 6, "|u1", "read_uint6_data"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: in the weight file, or, without an offset, in the program itself.

    `shape` is without sizes of 1, which operations want in different places.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int | None
    content: bytes


class Blobs:
    """The tensors of a weight file, mapped.

    Raises:
        OSError: it cannot be read.
        ValueError: it has another version.
    """

    def __init__(self, file: Path) -> None:
        self._data = np.memmap(file, np.uint8, "r")
        _, version = (int(each) for each in self._data[:8].view("<u4"))
        if version != _VERSION:
            raise ValueError(f"its weight file has version {version}")
        self._library = blob_library()._BlobStorageReader(str(file))

    def array(self, place: Place) -> npt.NDArray[Any]:
        """The numbers of a tensor, one to an element, as Apple's library reads them too."""
        known = TYPES.get(place.kind)
        if known is None:
            raise ValueError(f"numbers are of type {place.kind}")
        count = math.prod(place.shape)
        if place.offset is None:
            if known.bits < 8:
                raise ValueError(f"numbers of {place.kind} lie in the program")
            return np.frombuffer(place.content, known.numpy).reshape(place.shape)
        start, size = self._record(place.offset, known.number)
        if size != -(-count * known.bits // 8):
            raise ValueError(f"{place.kind} {place.shape} does not fill {size} bytes")
        found = _numbers(self._data[start : start + size], known, count)
        theirs, bits = getattr(self._library, known.read)(place.offset), f"u{found.itemsize}"
        if not np.array_equal(found.view(bits), theirs.view(bits)[:count]):
            raise ValueError(f"Apple's library reads other numbers at {place.offset}")
        return found.reshape(place.shape)

    def _record(self, offset: int, number: int) -> tuple[int, int]:
        """Where the bytes of a tensor begin, and how many they are."""
        end = len(self._data)
        if offset % _ALIGNMENT or not 0 < offset <= end - _ALIGNMENT:
            raise ValueError(f"a tensor lies at {offset} of {end} bytes")
        record = np.array(self._data[offset : offset + 32])
        mark, kind = (int(each) for each in record[:8].view("<u4"))
        size, start, padding = (int(each) for each in record[8:].view("<u8"))
        if mark != _MARK or kind != number or start != offset + _ALIGNMENT:
            raise ValueError(f"there is no tensor of type {number} at {offset}")
        if size > end - start or padding >= 8:
            raise ValueError(f"the tensor at {offset} has {size} bytes")
        return start, size


def place_of(value: Any) -> Place:
    """Where the tensor of a message Value lies.

    Raises:
        ValueError: in another file.
    """
    tensor = value.type.tensorType
    kind = messages("MIL").DataType.Name(tensor.dataType)
    sizes = (dimension.constant.size for dimension in tensor.dimensions)
    shape = tuple(size for size in sizes if size != 1)
    if value.WhichOneof("value") == "blobFileValue":
        if value.blobFileValue.fileName != _FILE:
            raise ValueError(f"a tensor lies in {value.blobFileValue.fileName}")
        return Place(kind, shape, value.blobFileValue.offset, b"")
    return Place(kind, shape, None, value.immediateValue.tensor.bytes.values)


def _numbers(raw: npt.NDArray[np.uint8], known: Type, count: int) -> npt.NDArray[Any]:
    """One number for each `known.bits`, the first in the lowest bits of the first byte."""
    if known.bits >= 8:
        return np.frombuffer(raw, known.numpy, count)
    found: npt.NDArray[Any]
    if known.bits in (2, 4):
        each, mask = 8 // known.bits, np.uint8((1 << known.bits) - 1)
        parts = np.empty((raw.size, each), np.uint8)
        for place in range(each):
            np.bitwise_and(raw >> np.uint8(place * known.bits), mask, out=parts[:, place])
        found = parts.reshape(-1)[:count]
    else:
        bits = np.unpackbits(raw, count=count * known.bits, bitorder="little")
        found = np.packbits(bits.reshape(count, known.bits), axis=1, bitorder="little").ravel()
    if known.numpy == "|i1":
        found = (found ^ np.uint8(8)).view(np.int8) - np.int8(8)
    return found
