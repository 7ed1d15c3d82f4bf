"""An independent GGUF reader: a file back to codes, scales and source names.

Shares no code with packing.py or writer.py and does not use gguf's reader, so a mistake in either
cannot hide here; the sizes of blocks are gguf's. Every length is checked against the file before
it is used: a hostile file is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...errors import BadInput
from ...quantize.blocks import BLOCK_GRIDS, BlockTensor, Quantized
from ...quantize.compiled import compiled
from ...quantize.ggml import Type
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
UInt64 = npt.NDArray[np.uint64]

# (weights, bytes) of a block
_BLOCKS = {
    Type.F32: (1, 4),
    Type.Q2_0: (64, 18),
    **{Type[kind.name]: n for kind, n in GGML_QUANT_SIZES.items() if kind.name in Type.__members__},
}
_GRID_TYPES = {
    "int4-g32-signed": Type.Q4_0,
    "int2-g64": Type.Q2_0,
    "int2-g256": Type.TQ2_0,
    **{
        f"{kind}-{group}{suffix}": held
        for kind, held in (("int4", Type.Q4_0), ("uint4", Type.Q5_0), ("int8", Type.Q8_0))
        for group in ("g32", "g64", "g128", "row")
        for suffix in ("", "-f16")
    },
}
_NEIGHBOURS = ("llama", "smollm3", "granite")  # LLAMA_ROPE_TYPE_NORM in llama.cpp
_ROPE_TENSORS = {
    "llama3": {"rope_freqs.weight"},
    "longrope": {"rope_factors_long.weight", "rope_factors_short.weight"},
}
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # as struct names them
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it stands in the file.

    Attributes:
        type: ggml's type.
        shape: rows first, as in numpy.
        rows: uint8 (rows, bytes per row), a view of the file; one row for a vector.
    """

    name: str
    type: Type
    shape: tuple[int, ...]
    rows: UInt8


@dataclass(frozen=True, slots=True)
class GGUF:
    """A parsed file: metadata by key, tensors by llama.cpp's name, in file order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def open_gguf(path: Path) -> GGUF:
    """Parse and map a file; tensor data is read when it is touched.

    Raises:
        BadInput: not a GGUF file of version 3, truncated, or inconsistent.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise _broken(path, f"it cannot be mapped: {error}") from error
    cursor = _Cursor(path, mapped)
    magic, version, tensor_count, pair_count = cursor.unpack("4sIQQ")
    if magic != b"GGUF" or version != 3:
        raise _broken(path, f"it starts with {magic!r}, version {version}, not b'GGUF', version 3")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise _broken(path, f"the key {key} stands twice")
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    infos = [cursor.tensor_info() for _ in range(tensor_count)]
    return GGUF(path, metadata, _tensors(path, mapped, cursor.position, metadata, infos))


def read_back(
    path: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of a finished file, under its source name and in source row order.

    Args:
        path: the file.
        config: of the decoder that the file should hold.
        grids: {source name: grid name} of the quantized weights.

    Raises:
        BadInput: malformed, a weight missing or unexpected, or of another type or shape.
    """
    file = open_gguf(path)
    for weight, stored in matched(file, config):
        found = unpack(path, stored, weight, config, grids.get(weight.name))
        if isinstance(found, np.ndarray) and weight.is_norm and config.family.norm_offset:
            found = found - np.float32(config.family.norm_offset)
        yield weight.name, found


def matched(file: GGUF, config: DecoderConfig) -> list[tuple[Weight, Stored]]:
    """Each weight of the decoder with its tensor; nothing missing, nothing left over."""
    expected = {weight.gguf: weight for weight in weights(config)}
    extra = _ROPE_TENSORS.get(config.rope.kind, set())
    difference = (set(expected) | extra) ^ set(file.tensors)
    if difference:
        name = min(difference)
        state = "missing" if name not in file.tensors else "unexpected"
        raise _broken(file.path, f"the tensor {name} is {state}")
    for name, weight in expected.items():
        if file.tensors[name].shape != weight.shape:
            shape = file.tensors[name].shape
            raise _broken(file.path, f"{name} has shape {shape} instead of {weight.shape}")
    return [(weight, file.tensors[name]) for name, weight in expected.items()]


def unpack(
    path: Path, stored: Stored, weight: Weight, config: DecoderConfig, grid: str | None
) -> QuantizedTensor | BlockTensor | Float32:
    """One tensor in source row order: on its grid, or float32 where `grid` is None.

    A norm is as it stands in the file, with the family's offset in it.
    """
    block_grid = BLOCK_GRIDS.get(grid or "")
    expected: set[Type | None] = {Type.F32, Type.F16}
    if grid is not None:
        expected = {block_grid.type if block_grid else _GRID_TYPES.get(grid)}
    if stored.type not in expected:
        raise _broken(
            path, f"{stored.name} is {stored.type.name}, which does not hold {grid or 'float'}"
        )
    rows = source_rows(weight, config)
    if grid is None:
        values = stored.rows.view("<f4" if stored.type == Type.F32 else "<f2").astype(np.float32)
        restored = np.empty_like(values.reshape(stored.shape))
        restored[rows] = values.reshape(stored.shape)
        return restored
    if block_grid is not None:
        blocks = np.empty_like(stored.rows)
        blocks[rows] = stored.rows
        return BlockTensor(block_grid, blocks)
    return unpack_rows(path, stored, rows, GRIDS[grid])


def unpack_rows(
    path: Path, stored: Stored, source: npt.NDArray[np.int64], grid: Grid
) -> QuantizedTensor:
    """Codes and scales of a quantized tensor whose row i is row source[i] of the result.

    Raises:
        BadInput: one scale is expected for a row or several blocks, and these do not repeat it.
    """
    codes = np.empty(stored.shape, np.int8)
    scale = np.empty((stored.shape[0], stored.shape[1] // _BLOCKS[stored.type][0]), np.float32)
    if stored.type in (Type.Q2_0, Type.TQ2_0):
        codes[source] = _two_bits(stored)
    elif stored.type == Type.Q5_0:
        codes[source] = _five_bits(stored)
    elif stored.type == Type.Q4_0:
        _unpack_nibbles(stored.rows.view("<u2"), source, codes.view("<u8"))
    else:
        _unpack_bytes(stored.rows.view("<u2"), source, codes.view("<u2"))
    scale[source] = _scales(stored)
    groups = grid.groups(stored.shape[1])
    return QuantizedTensor(
        grid, codes, scale if groups == scale.shape[1] else _collapse(path, stored, scale, groups)
    )


def source_rows(weight: Weight, config: DecoderConfig) -> npt.NDArray[np.int64]:
    """The source row of each row in the file.

    Some graphs of llama.cpp rotate neighbours: pair i of a head stands in rows 2i and 2i + 1 of
    the file and in rows i and i + head_dim / 2 of the source.
    """
    row: npt.NDArray[np.int64] = np.arange(weight.shape[0])
    if config.family.gguf not in _NEIGHBOURS or weight.kind not in (Kind.Q, Kind.K):
        return row
    head, within = np.divmod(row, config.head_dim)
    source: npt.NDArray[np.int64] = (
        head * config.head_dim + within // 2 + within % 2 * (config.head_dim // 2)
    )
    return source


def _scales(stored: Stored) -> Float32:
    words = _BLOCKS[stored.type][1] // 2
    blocks = stored.rows.view("<u2").reshape(stored.shape[0], -1, words)
    place = -1 if stored.type == Type.TQ2_0 else 0
    return np.ascontiguousarray(blocks[:, :, place]).view("<f2").astype(np.float32)


def _two_bits(stored: Stored) -> npt.NDArray[np.int8]:
    """Codes -1 .. 2 in the order of the row.

    Code i of a Q2_0 block stands in bits 2 (i % 4) of byte i // 4 after the scale; code i of a
    TQ2_0 block in bits 2 (i // 32 % 4) of byte 32 (i // 128) + i % 32.
    """
    size, length = _BLOCKS[stored.type]
    code = np.arange(size)
    if stored.type == Type.Q2_0:
        byte, shift = 2 + code // 4, code % 4 * 2
    else:
        byte, shift = code // 128 * 32 + code % 32, code // 32 % 4 * 2
    blocks = stored.rows.reshape(-1, length)
    found = (blocks[:, byte] >> shift.astype(np.uint8)) & np.uint8(3)
    return (found.astype(np.int8) - np.int8(1)).reshape(stored.shape)


def _five_bits(stored: Stored) -> npt.NDArray[np.int8]:
    """Codes -16 .. 15 of Q5_0 in the order of the row.

    Code i has its low bits in byte 6 + i % 16 of the block, from bit 4 (i // 16) on, and its fifth
    bit in bit i % 8 of byte 2 + i // 8.
    """
    blocks, code = stored.rows.reshape(-1, 22), np.arange(32)
    low = blocks[:, 6 + code % 16] >> (code // 16 * 4).astype(np.uint8) & np.uint8(15)
    fifth = blocks[:, 2 + code // 8] >> (code % 8).astype(np.uint8) & np.uint8(1)
    return (low.astype(np.int8) + 16 * fifth.astype(np.int8) - np.int8(16)).reshape(stored.shape)


def _collapse(path: Path, stored: Stored, scale: Float32, groups: int) -> Float32:
    """One scale per group, which its blocks must repeat."""
    parts = scale.reshape(len(scale), groups, -1)
    differing = np.argwhere(parts != parts[:, :, :1])
    if differing.size:
        row, group, block = differing[0]
        first = group * parts.shape[2]
        why = f"row {row} has another scale in block {first + block} than in block {first}"
        raise _broken(path, f"{stored.name}: {why}")
    return np.ascontiguousarray(parts[:, :, 0])


@compiled
def _unpack_nibbles(rows: UInt16, source: npt.NDArray[np.int64], codes: UInt64) -> None:
    """Sixteen codes at a time: rows (rows, 9 per block) into codes (rows, 4 per block).

    In each byte, 0x78 plus a nibble has its highest bit set from 8 on; flipped, it is a sign.
    """
    mask, bias = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x7878787878787878)
    sign = np.uint64(0x8080808080808080)
    for row in range(rows.shape[0]):
        unpacked = codes[source[row]]
        for i in range(unpacked.size // 2):
            block, half = divmod(i, 2)
            first = 9 * block + 1 + 4 * half
            word = np.uint64(0)
            for j in range(4):
                word |= np.uint64(rows[row, first + j]) << np.uint64(16 * j)
            unpacked[4 * block + half] = ((word & mask) + bias) ^ sign
            unpacked[4 * block + 2 + half] = (((word >> np.uint64(4)) & mask) + bias) ^ sign


@compiled
def _unpack_bytes(rows: UInt16, source: npt.NDArray[np.int64], codes: UInt16) -> None:
    """Two codes at a time: rows (rows, 17 per block) into codes (rows, 16 per block)."""
    for row in range(rows.shape[0]):
        unpacked = codes[source[row]]
        for block in range(unpacked.size // 16):
            for i in range(16):
                unpacked[16 * block + i] = rows[row, 17 * block + 1 + i]


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type: Type
    offset: int


class _Cursor:
    """Reads little-endian values, never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise _broken(
                self.path, f"{count} bytes are needed at {self.position} of {len(self.data)}"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def string(self) -> str:
        raw = self.take(self.unpack("Q")[0])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _broken(self.path, f"a string before {self.position} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise _broken(self.path, f"value type {kind} before {self.position} is unknown")
        element, count = self.unpack("IQ")
        if element == _STRING:
            return [self.string() for _ in range(count)]
        if element not in _SCALARS:
            raise _broken(self.path, f"an array of type {element} before {self.position}")
        layout = np.dtype("<" + _SCALARS[element])
        return np.frombuffer(self.take(count * layout.itemsize), layout)

    def tensor_info(self) -> _Info:
        name = self.string()
        (dimensions,) = self.unpack("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _broken(self.path, f"the tensor {name} has {dimensions} dimensions")
        shape = self.unpack(f"{dimensions}Q")
        kind, offset = self.unpack("IQ")
        if kind not in _BLOCKS:
            raise _broken(self.path, f"the tensor {name} has ggml type {kind}")
        return _Info(name, shape[::-1], Type(kind), offset)


def _tensors(
    path: Path, data: mmap.mmap, end: int, metadata: Mapping[str, Any], infos: list[_Info]
) -> dict[str, Stored]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _broken(path, f"the alignment {alignment!r} is no power of two")
    start = -(-end // alignment) * alignment
    tensors: dict[str, Stored] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.offset):
        size = _size(path, info)
        if info.name in tensors or info.offset % alignment or info.offset < free:
            raise _broken(path, f"{info.name} stands twice, overlaps or is not aligned")
        free = info.offset + size
        if start + free > len(data):
            raise _broken(path, f"{info.name} ends at {start + free} of {len(data)} bytes")
        raw = np.frombuffer(data, np.uint8, size, start + info.offset)
        rows = math.prod(info.shape[:-1])
        tensors[info.name] = Stored(info.name, info.type, info.shape, raw.reshape(rows, -1))
    return tensors


def _size(path: Path, info: _Info) -> int:
    block, size = _BLOCKS[info.type]
    if 0 in info.shape or info.shape[-1] % block:
        raise _broken(path, f"{info.name}: no {info.type.name} tensor has shape {info.shape}")
    return math.prod(info.shape) // block * size


def _broken(path: Path, why: str) -> BadInput:
    return BadInput(f"{path.name} is not the GGUF file it should be", why, "export it again")
