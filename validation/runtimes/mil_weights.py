"""Weights of an ML Program: what stored codes mean, computed when an operation reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .mil_package import KINDS, Stored

_CHUNK = 1 << 20  # numbers that are computed at a time
_Places = npt.NDArray[np.int64]


class Meaning(Protocol):
    """Numbers (shape) that are computed from what a package holds."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def aligned(self) -> bool:
        """Some places of the first axis are computed without all others."""
        ...

    def rows(self, places: _Places) -> Tensor:
        """float32 (places, *shape[1:]) of places of the first axis."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """The numbers themselves."""

    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def aligned(self) -> bool:
        return self.stored.aligned

    def rows(self, places: _Places) -> Tensor:
        return torch.from_numpy(self.stored.numbers(places)).float()


@dataclass(frozen=True, slots=True)
class Looked:
    """constexpr_lut_to_dense: indices into tables.

    Attributes:
        table: (groups of each axis of the indices, 2**bits, 1); a group is a range of places.
    """

    indices: Stored
    table: Stored

    @classmethod
    def of(cls, indices: Stored, table: Stored) -> Looked:
        """Raises ValueError if one does not go with the other."""
        *groups, entries, length = table.shape if len(table.shape) >= 2 else (0, 0)
        if length != 1:
            raise ValueError(f"it has vectors of {length} numbers")
        if not indices.kind.startswith("UINT") or entries != 2 ** KINDS[indices.kind].bits:
            raise ValueError(f"it has {entries} entries for indices of {indices.kind}")
        _refuse_blocks(indices.shape, groups)
        return cls(indices, table)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.indices.shape

    @property
    def aligned(self) -> bool:
        return self.indices.aligned

    def rows(self, places: _Places) -> Tensor:
        *groups, entries, _ = self.table.shape
        found = torch.from_numpy(self.indices.numbers(places)).long()
        stride = entries
        for axis in reversed(range(len(groups))):
            if groups[axis] > 1:
                along = places if axis == 0 else np.arange(self.shape[axis])
                group = along // (self.shape[axis] // groups[axis]) * stride
                sizes = [-1 if each == axis else 1 for each in range(len(groups))]
                found += torch.from_numpy(group).reshape(sizes)
            stride *= groups[axis]
        return torch.from_numpy(self.table.numbers().reshape(-1)).float()[found]


@dataclass(frozen=True, slots=True)
class Scaled:
    """constexpr_blockwise_shift_scale: scale * (data - offset), each for a block of the data.

    Attributes:
        scale, offset: (blocks of each axis of the data).
    """

    data: Plain | Looked
    scale: Stored
    offset: Stored | None

    @classmethod
    def of(cls, data: Plain | Looked, scale: Stored, offset: Stored | None) -> Scaled:
        """Raises ValueError if one does not go with the other."""
        _refuse_blocks(data.shape, scale.shape)
        if offset is not None and offset.shape != scale.shape:
            raise ValueError(f"its offset is {offset.shape}, its scale {scale.shape}")
        return cls(data, scale, offset)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def aligned(self) -> bool:
        return self.data.aligned

    def rows(self, places: _Places) -> Tensor:
        found = self.data.rows(places)
        sizes, ones = [len(places)], [len(places)]
        for size, blocks in zip(self.shape[1:], self.scale.shape[1:], strict=True):
            sizes += [blocks, size // blocks]
            ones += [blocks, 1]
        block = places // (self.shape[0] // self.scale.shape[0])
        grouped = found.reshape(sizes)
        if self.offset is not None:
            grouped = grouped - Plain(self.offset).rows(block).reshape(ones)
        return (grouped * Plain(self.scale).rows(block).reshape(ones)).reshape(found.shape)


def _refuse_blocks(shape: tuple[int, ...], blocks: Any) -> None:
    sizes = zip(shape, blocks, strict=False)
    if not shape or len(shape) != len(blocks) or any(n < 1 or size % n for size, n in sizes):
        raise ValueError(f"{tuple(blocks)} blocks do not divide {shape}")


class Room:
    """Bytes for weights in float32.

    Those that are read first stay: a program reads all of them in the same order each time, and to
    drop the least recently used one would drop each of them just before it is read again.
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes

    def takes(self, nbytes: int) -> bool:
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True


class Weight:
    """A constant that is computed when it is read, and kept where there is room.

    Args:
        half: it is rounded to float16.
    """

    def __init__(self, meaning: Meaning, room: Room, half: bool) -> None:
        self._meaning, self._room, self._half = meaning, room, half
        self._kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._meaning.shape

    def dense(self) -> Tensor:
        """float32, its shape."""
        if self._kept is not None:
            return self._kept
        made = torch.empty(self.shape)
        rows = self.shape[0]
        step = max(1, _CHUNK // max(1, math.prod(self.shape[1:])))
        for start in range(0, rows, step if self._meaning.aligned else max(1, rows)):
            stop = min(start + step, rows) if self._meaning.aligned else rows
            made[start:stop] = self._rows(np.arange(start, stop))
        if self._room.takes(4 * made.numel()):
            self._kept = made
        return made

    def rows(self, places: Tensor) -> Tensor:
        """float32 (places, *shape[1:]) of places of the first axis: only they are computed.

        Raises:
            IndexError: there is no such place.
        """
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= self.shape[0]):
            raise IndexError(f"a place is beyond {self.shape[0]}")
        if self._kept is not None:
            return self._kept.index_select(0, places)
        return self._rows(places.numpy().astype(np.int64))

    def _rows(self, places: _Places) -> Tensor:
        found = self._meaning.rows(places)
        return found.half().float() if self._half else found
