"""An independent reader: `Model.aimodel` back to codes, scales and source names.

Shares no code with the writer. MLIR bytecode, version 6, by LLVM's description of it; of a program
only its named blobs are read, because what its operations mean is Apple's. Apple's loader checks
nothing: a program that is cut short, has blobs of other sizes or lacks its sha256 is BadInput here,
never a crash or a large allocation.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig, Weight, weights
from ...architectures.rotation import turns
from ...errors import BadInput
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor

PROGRAM, HASH = Path("Model.aimodel/main.mlirb"), Path("Model.aimodel/main.hash")
UInt8 = npt.NDArray[np.uint8]
_MAGIC, _VERSION, _FILL = b"ML\xefR", 6, 0xCB
_STRINGS, _BLOBS, _SIZES, _KINDS = 0, 5, 6, 9
_LONGEST = 1 << 16  # bytes of a name
_ALIGNMENT = 64


class _Held(NamedTuple):
    """How a grid is held: bits of a code, what is stored for its lowest code, dtype of scales."""

    bits: int
    lowest: int
    scale: str


_GRIDS = {
    "int4-g32": _Held(4, -8, "<f2"),
    "int4-g32-signed": _Held(4, -8, "<f2"),
    "int8-row": _Held(8, -127, "<f4"),
    "int2-g64": _Held(2, 0, "<f2"),
    "nf4-g64": _Held(4, 0, "<f4"),
}


class File:
    """A program and the blobs in it.

    Attributes:
        blobs: {name: its bytes}.

    Raises:
        BadInput: it is no such program, or not the one that its hash names.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / PROGRAM
        self._data = _mapped(path)
        _require_hash(self._data, folder / HASH)
        try:
            self.blobs = self._read()
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            _broken(f"it ends too early, or names what is not there: {error}", error)

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A blob, of which the size must be that of the shape."""
        found = self.bytes_of(name, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return found.view(dtype).reshape(shape)

    def bytes_of(self, name: str, size: int) -> UInt8:
        """A blob, of which the size is known."""
        if name not in self.blobs:
            _broken(f"it has no constant {name}")
        start, length = self.blobs[name]
        if length != size:
            _broken(f"{name} has {length} bytes and not {size}")
        return np.frombuffer(self._data, np.uint8, size, start)

    def _read(self) -> dict[str, tuple[int, int]]:
        """{name: (place, bytes)} of each blob."""
        if self._data[:4] != _MAGIC:
            _broken("it does not begin as MLIR bytecode does")
        version, place = self._number(4)
        if version != _VERSION:
            _broken(f"its version is {version}, not {_VERSION}")
        end = self._data.find(b"\0", place)
        if end < 0:
            _broken("its producer has no end")
        places = self._sections(end + 1)
        for kind in (_STRINGS, _BLOBS, _SIZES):
            if kind not in places:
                _broken(f"it has no section {kind}")
        return self._blobs_of(places, self._strings(*places[_STRINGS]))

    def _sections(self, place: int) -> dict[int, tuple[int, int]]:
        """{kind: (place, end)}"""
        found: dict[int, tuple[int, int]] = {}
        while place < len(self._data):
            first = self._data[place]
            size, place = self._number(place + 1)
            if first & 128:
                alignment, place = self._number(place)
                place = self._filled(place, alignment)
            kind = first & 127
            if kind >= _KINDS or kind in found:
                _broken(f"section {kind} is unknown or there twice")
            if size > len(self._data) - place:
                _broken(f"section {kind} of {size} bytes goes beyond the end of the file")
            found[kind] = place, place + size
            place += size
        return found

    def _strings(self, place: int, end: int) -> list[str]:
        count, place = self._number(place)
        if count > end - place:
            _broken(f"there is no room for {count} strings")
        lengths = []
        for _ in range(count):
            length, place = self._number(place)
            lengths.append(length)
        if not all(lengths) or sum(lengths) != end - place:
            _broken("the lengths of its strings do not add up")
        found = []
        for length in reversed(lengths):
            if length > _LONGEST or self._data[place + length - 1]:
                _broken("a string is too long, or has no end")
            found.append(self._data[place : place + length - 1].decode("utf-8", "replace"))
            place += length
        return found

    def _blobs_of(
        self, places: Mapping[int, tuple[int, int]], strings: list[str]
    ) -> dict[str, tuple[int, int]]:
        (place, end), (start, stop) = places[_SIZES], places[_BLOBS]
        external, place = self._number(place)
        if external:
            _broken("it has resources of the app")
        found: dict[str, tuple[int, int]] = {}
        while place < end:
            _, place = self._number(place)
            count, place = self._number(place)
            if count > end - place:
                _broken(f"there is no room for {count} blobs")
            for _ in range(count):
                key, place = self._number(place)
                size, place = self._number(place)
                if self._data[place] or size > stop - start:
                    _broken("a resource is no blob, or goes beyond its section")
                if strings[key] in found:
                    _broken(f"{strings[key]} is there twice")
                found[strings[key]] = self._blob(start, start + size)
                start, place = start + size, place + 1
        if place != end or start != stop:
            _broken("the sizes of its blobs do not add up")
        return found

    def _blob(self, place: int, end: int) -> tuple[int, int]:
        alignment, place = self._number(place)
        length, place = self._number(place)
        place = self._filled(place, alignment)
        if place + length != end:
            _broken("a blob is shorter or longer than its section says")
        return place, length

    def _filled(self, place: int, alignment: int) -> int:
        """The place behind the bytes that fill up to an alignment."""
        if alignment not in (1, 2, 4, 8, 16, 32, _ALIGNMENT):
            _broken(f"its alignment is {alignment}")
        after = place + -place % alignment
        if any(byte != _FILL for byte in self._data[place:after]):
            _broken("what fills up to an alignment is something else")
        return after

    def _number(self, place: int) -> tuple[int, int]:
        """A number of variable length, and the place behind it."""
        first = self._data[place]
        if not first:
            return int(struct.unpack_from("<Q", self._data, place + 1)[0]), place + 9
        length = 1
        while not first >> (length - 1) & 1:
            length += 1
        whole = self._data[place : place + length]
        if len(whole) != length:
            _broken("it ends within a number")
        return int.from_bytes(whole, "little") >> length, place + length


def read_back(
    file: File, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight, under its source name and in source row order.

    Args:
        grids: {source name: grid name} of the quantized weights.

    Raises:
        BadInput: a constant is missing, one too many, or of another size.
    """
    require_names(file, config, grids)
    for weight in weights(config):
        yield weight.name, unpack(file, weight, grids.get(weight.name))


def require_names(file: File, config: DecoderConfig, grids: Mapping[str, str]) -> None:
    """Raise BadInput if there are other constants than those of the weights, levels and ropes.

    And unless those that are no weights hold what they are made of.
    """
    wanted = {"places"}
    for weight in weights(config):
        stem = weight.name.removesuffix(".weight")
        quantized = weight.name in grids
        wanted |= {f"{stem}.codes", f"{stem}.scale"} if quantized else {weight.name}
    wanted |= {f"levels.{grid}" for grid in grids.values() if grid == "nf4-g64"}
    ropes = {
        f"rope.{index}": each.rope for index, each in enumerate(config.attentions) if each.rope
    }
    wanted |= ropes.keys()
    if differ := sorted(wanted ^ file.blobs.keys()):
        _broken(f"the first of {len(differ)} constants that are missing or too many is {differ[0]}")
    context = file.blobs["places"][1] // 4
    if not np.array_equal(file.array("places", "<i4", (context,)), np.arange(context)):
        _broken("places are not the positions of a text")
    for name, rope in ropes.items():
        found = file.array(name, "<f4", (2, context, rope.rotated(config.head_dim)))
        if not np.array_equal(found, np.tile(turns(rope, config.head_dim, context), 2)):
            _broken(f"{name} has other numbers")
    for grid in set(grids.values()) & {"nf4-g64"}:
        levels = file.array(f"levels.{grid}", "<f4", (16,))
        if not np.array_equal(levels, np.array(GRIDS[grid].levels, np.float32)):
            _broken(f"levels.{grid} are others")


def unpack(file: File, weight: Weight, grid: str | None) -> QuantizedTensor | Float32:
    """One weight: on its grid, or float32 where `grid` is None.

    Raises:
        BadInput: it is not there, or not of this size or grid.
    """
    if grid is None:
        found: Float32 = file.array(weight.name, "<f4", weight.shape)
        return found
    if grid not in _GRIDS:
        _broken(f"{weight.name}: the grid {grid} is not held")
    meaning, held, stem = GRIDS[grid], _GRIDS[grid], weight.name.removesuffix(".weight")
    rows, columns = weight.shape
    if not meaning.fits((rows, columns)) or rows * columns * held.bits % 8:
        _broken(f"{weight.name} of {rows} x {columns} has no whole groups of {grid}")
    packed = file.bytes_of(f"{stem}.codes", rows * columns * held.bits // 8)
    scale = file.array(f"{stem}.scale", held.scale, (rows, meaning.groups(columns)))
    codes = _unpacked(packed, meaning, held).reshape(rows, columns)
    if codes.min(initial=0) < meaning.low or codes.max(initial=0) > meaning.high:
        _broken(f"{weight.name} has a code that is not on {grid}")
    if not np.isfinite(scale).all() or not (meaning.signed_scale or (scale > 0).all()):
        _broken(f"{weight.name} has a scale that is not on {grid}")
    return QuantizedTensor(meaning, codes, np.ascontiguousarray(scale, np.float32))


def _unpacked(packed: UInt8, grid: Grid, held: _Held) -> npt.NDArray[np.int8]:
    """Codes, the first of a byte in its low bits."""
    if held.bits == 8:
        return packed.view(np.int8)
    mask, each = np.uint8((1 << held.bits) - 1), 8 // held.bits
    stored = np.stack([packed >> np.uint8(held.bits * n) & mask for n in range(each)], axis=-1)
    if held.lowest < 0:  # two's complement
        half = np.uint8(1 << (held.bits - 1))
        return (stored ^ half).view(np.int8) - half.view(np.int8)
    return stored.view(np.int8) + np.int8(grid.low)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        _broken(f"it cannot be read: {error}", error)


def _require_hash(data: mmap.mmap, path: Path) -> None:
    try:
        stated = path.read_bytes()
    except OSError as error:
        _broken("main.hash, its sha256, is not there", error)
    if stated != hashlib.sha256(data).digest():
        _broken("its sha256 is not the one in main.hash")


def _broken(why: str, error: Exception | None = None) -> NoReturn:
    raise BadInput(
        f"{PROGRAM} is not a model that slimport wrote", why, "export the model again"
    ) from error
