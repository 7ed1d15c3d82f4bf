"""What the readers of all .pte files share: where weights lie, and what their bytes mean.

Part of the readers, which share no code with what writes the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...architectures import EMBEDDING, DecoderConfig, Kind, Weight, weights
from ...architectures.rotation import turns
from ...quantize.grid import Float32, Grid
from ...quantize.tensor import QuantizedTensor
from .opened import Lookup, Place, UInt8, broken, is_table

_KEY = re.compile(
    r"(?P<stem>.+?)(\.lookup)?\.(?P<part>codes|scale|zero|weight|bias)"
    r"(\[(?P<start>\d{1,9}):(?P<stop>\d{1,9})\])?:[0-9a-f]{16}"
)


class Rows(NamedTuple):
    """What a key says: the source name of a weight, which part, and which rows; None: all."""

    name: str
    part: str
    rows: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Held:
    """What a program holds.

    Attributes:
        data: the whole files, by their names.
        keys: where that lies what has a name.
        lookup: the embedding, for the kernel.
        stamps: {source name: the digits of its digest that are in its keys}.
    """

    data: Mapping[str, UInt8]
    keys: Mapping[str, Place]
    lookup: Lookup
    stamps: Mapping[str, str]

    def array(self, place: Place, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of a file.

        Raises:
            BadInput: the array has another size than its place.
        """
        count = math.prod(shape)
        if place.nbytes != count * np.dtype(dtype).itemsize:
            raise broken(f"{dtype} {shape} does not fill {place.nbytes} bytes at {place.start}")
        return np.frombuffer(self.data[place.file], dtype, count, place.start).reshape(shape)


def looked_up(file: Held, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
    """The embedding as the kernel reads it; float16 becomes float32."""
    table, scale = lookup_arrays(file, weight, grid)
    if grid is None or scale is None:
        return table.astype(np.float32)
    if grid.bits == 2:
        return on_grid(weight, grid, _pairs_of_bits(table), scale)
    codes = np.array(table) if grid.bits == 8 else nibbles(table, high_first=True)
    return on_grid(weight, grid, codes, scale)


def lookup_arrays(
    file: Held, weight: Weight, grid: Grid | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Table and scales of the kernel, as they lie in the file."""
    found, (rows, columns) = file.lookup, weight.shape
    bits = 16 if grid is None else grid.bits
    width = columns * bits // 8 if bits < 8 else columns
    if found.bits != bits or found.table.shape != (rows, width):
        raise broken(f"{weight.name} is looked up in {found.bits} bits {found.table.shape}")
    table = file.array(found.table.place, found.table.dtype, found.table.shape)
    if grid is None or found.scale is None:
        return table, None
    shape = (rows, grid.groups(columns))
    if found.scale.shape != shape:
        raise broken(f"{weight.name} has scales {found.scale.shape}, not {shape}")
    if found.zero is not None:
        zero = file.array(found.zero.place, found.zero.dtype, found.zero.shape)
        if zero.shape != shape or (zero != -1).any():
            raise broken(f"{weight.name} has zero points that are not -1")
    return table, file.array(found.scale.place, found.scale.dtype, shape)


def on_grid(
    weight: Weight, grid: Grid, codes: npt.NDArray[np.int8], scale: npt.NDArray[Any]
) -> QuantizedTensor:
    """Codes and scales; a code of 4 bits is within any grid of 4 bits, one of 8 need not be."""
    if grid.levels is not None or codes.min() < grid.low or codes.max() > grid.high:
        raise broken(f"{weight.name} has codes beyond the grid {grid.name}")
    if not ((scale > 0) & np.isfinite(scale)).all():
        raise broken(f"{weight.name} has a scale that is not above 0, or not finite")
    return QuantizedTensor(grid, codes, np.array(scale, np.float32, order="C"))


def stamps_of(keys: Iterable[str]) -> dict[str, str]:
    """{source name: digits of its digest} of the keys of weights."""
    found: dict[str, str] = {}
    for key in keys:
        name, stamp = source(key), key.rpartition(":")[2]
        if found.setdefault(name, stamp) != stamp:
            raise ValueError(f"{name} has two digests")
    return found


def require_order(names: Sequence[str], config: DecoderConfig) -> None:
    """ValueError unless these are the weights of a decoder, each once, as one runs them."""
    wanted = [weight.name for weight in weights(config) if weight.kind is not Kind.EMBEDDING]
    if config.tied:
        wanted.append(EMBEDDING)
    for found, expected in zip_longest(names, wanted, fillvalue="nothing"):
        if found != expected:
            raise ValueError(f"forward computes with {found} in the place of {expected}")


def require_tables(file: Held, config: DecoderConfig, repeats: int = 1) -> None:
    """ValueError unless tables of ropes and numbers are what their keys say.

    Args:
        repeats: how often a row of a rope's table has its numbers, one after the other.
    """
    for key, place in file.keys.items():
        if not is_table(key):
            continue
        held = np.frombuffer(file.data[place.file], "<f4", place.nbytes // 4, place.start)
        kind, _, rest = key.partition(".")
        if kind == "rope":
            index, _, half = rest.partition(".")
            rope = config.ropes[int(index)]
            width = rope.rotated(config.head_dim) // 2
            pair = turns(rope, config.head_dim, held.size // (width * repeats))
            wanted = np.tile(pair[half == "sin"], repeats).ravel()
        elif kind == "number":
            wanted = np.array([float(rest)], "<f4")
        elif kind == "offset":
            wanted = np.full(int(rest), config.family.norm_offset, "<f4")
        else:
            wanted = np.arange(held.size, dtype="<f4")
        if not np.array_equal(held, wanted):
            raise ValueError(f"{key} has other numbers")


def source(key: str) -> str:
    """The source name of a weight, of the key of any of its tensors."""
    return rows_of(key).name


def rows_of(key: str) -> Rows:
    """What the key of a tensor says that it is.

    Raises:
        ValueError: it is not the key of a weight.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key} is not the key of a weight")
    name = f"{found['stem']}.{'bias' if found['part'] == 'bias' else 'weight'}"
    rows = (int(found["start"]), int(found["stop"])) if found["start"] else None
    return Rows(name, found["part"], rows)


def _pairs_of_bits(packed: UInt8) -> npt.NDArray[np.int8]:
    """Numbers of 2 bits that were raised by 1: (rows, bytes) to int8 (rows, 4 * bytes)."""
    found = packed[:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
    return found.astype(np.int8).reshape(len(packed), -1) - np.int8(1)


def nibbles(packed: UInt8, high_first: bool) -> npt.NDArray[np.int8]:
    """Numbers of 4 bits that were raised by 8: (rows, bytes) to int8 (rows, 2 * bytes)."""
    found = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=found[:, :, int(high_first)])
    np.right_shift(packed, np.uint8(4), out=found[:, :, int(not high_first)])
    found -= np.uint8(8)  # wraps round
    return found.view(np.int8).reshape(len(packed), -1)
