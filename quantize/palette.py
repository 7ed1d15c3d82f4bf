"""Palettized grids: rows share a look-up table of levels, as Core ML keeps them.

value = levels[row // group][code] and nothing more: `constexpr_lut_to_dense` of MIL (iOS 18), which
coremltools makes for granularity "per_grouped_channel" on axis 0. Core ML holds the levels as
float16, so each of them is exact there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from .grid import Float32, Int8
from .tensor import start_digest

LEVEL_DTYPE = "<f2"  # in which a level is exact, as numpy writes it
LARGEST_LEVEL = 65504.0


@dataclass(frozen=True, slots=True)
class PaletteGrid:
    """The weights that codes of `bits` can represent, with levels of their own for each row group.

    A weight matrix of shape (rows, columns) has int8 codes of the same shape and float32 levels of
    shape (rows / group, 2 ** bits). So lut4-r16 over a (256, 768) matrix has codes (256, 768) and
    levels (16, 16).

    Attributes:
        name: as written in recipes, manifests and on the command line.
        bits: bits per code; codes run from 0 to 2 ** bits - 1.
        group: consecutive rows that share their levels.
    """

    name: str
    bits: int
    group: int

    @property
    def size(self) -> int:
        """Levels of one row group."""
        return 1 << self.bits

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the rows of a matrix of `shape` divide into whole groups."""
        return shape[0] % self.group == 0

    def bits_per_weight(self, columns: int) -> float:
        """Bits of codes and levels for each weight in rows of `columns` inputs."""
        levels = 8 * np.dtype(LEVEL_DTYPE).itemsize * self.size
        return self.bits + levels / (self.group * columns)

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Bytes of codes, packed row by row, and levels for a matrix of `shape`."""
        rows, columns = shape
        levels = rows // self.group * self.size * np.dtype(LEVEL_DTYPE).itemsize
        return rows * -(-columns * self.bits // 8) + levels


LUT3_R16 = PaletteGrid("lut3-r16", bits=3, group=16)
LUT4_R16 = PaletteGrid("lut4-r16", bits=4, group=16)
LUT6_R16 = PaletteGrid("lut6-r16", bits=6, group=16)
PALETTE_GRIDS = {grid.name: grid for grid in (LUT3_R16, LUT4_R16, LUT6_R16)}


@dataclass(frozen=True, slots=True)
class PaletteTensor:
    """A weight matrix of shape (rows, columns) on a palettized grid.

    Attributes:
        grid: how many codes there are, and how many rows share their levels.
        codes: int8 (rows, columns), each within 0..2 ** bits - 1, in source row order.
        levels: float32 (rows / group, 2 ** bits), finite, each exact in float16.

    Raises:
        BadInput: a shape, dtype or value disagrees with the grid.
    """

    grid: PaletteGrid
    codes: Int8
    levels: Float32

    def __post_init__(self) -> None:
        rows = len(self.codes)
        wanted = (rows // self.grid.group, self.grid.size)
        if self.codes.dtype != np.int8 or self.levels.dtype != np.float32:
            raise _inconsistent(f"codes are {self.codes.dtype}, levels {self.levels.dtype}")
        if not self.grid.fits(self.shape) or self.levels.shape != wanted:
            raise _inconsistent(
                f"codes {self.codes.shape} on {self.grid.name} need levels {wanted},"
                f" not {self.levels.shape}"
            )
        if self.codes.size and not 0 <= self.codes.min() <= self.codes.max() < self.grid.size:
            raise _inconsistent(f"codes {self.codes.min()} to {self.codes.max()} are not all there")
        if not np.array_equal(round_levels(self.levels), self.levels):
            raise _inconsistent("a level is not exact in float16")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> Float32:
        """The represented weights, float32 (rows, columns)."""
        values = np.empty(self.codes.shape, np.float32)
        for index, levels in enumerate(self.levels):
            rows = slice(index * self.grid.group, (index + 1) * self.grid.group)
            values[rows] = levels[self.codes[rows]]
        return values

    def digest(self, name: str) -> str:
        """sha256 (hex) over name, grid, shape, codes (int8) and levels (float32, little-endian).

        Row-major, as QuantizedTensor.digest.
        """
        digest = start_digest(name, self.grid.name, self.shape)
        digest.update(np.ascontiguousarray(self.codes).data)
        digest.update(np.ascontiguousarray(self.levels, "<f4").data)
        return digest.hexdigest()


def round_levels(levels: Float32) -> Float32:
    """The nearest float16 of each level, half to even; beyond its range the last one there is."""
    limited = np.clip(levels, -LARGEST_LEVEL, LARGEST_LEVEL)
    rounded: Float32 = limited.astype(LEVEL_DTYPE).astype(np.float32)
    return rounded


def _inconsistent(why: str) -> BadInput:
    return BadInput("a quantized weight is inconsistent", why, "quantize the model again")
