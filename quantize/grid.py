"""What a code means: value = level * scale, a scale per group of inputs or per output row.

The level of a code is the code itself, but for grids with a codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

SCALE_FLOOR = 2.0**-17  # fp16 subnormals still hold 8 significant bits down to here
SCALE_CEILING = 255.0 * 256.0  # the largest fp16 value with 8 significant bits


@dataclass(frozen=True, slots=True)
class Grid:
    """A set of representable weights.

    A weight matrix of shape (rows, columns) has int8 codes of the same shape and a float32 scale
    of shape (rows, columns / group), or (rows, 1) where `group` is None. So int4-g32 over a
    (256, 768) matrix has codes (256, 768) and scales (256, 24).

    Attributes:
        name: as written in recipes, manifests and on the command line.
        bits: bits per code.
        low, high: the smallest and the largest code.
        group: inputs that share one scale; None for one scale per output row.
        signed_scale: whether a scale may be negative.
        levels: what the codes from `low` on stand for; None: for themselves. A scale is then the
            largest magnitude of its group, as it is in float32.
    """

    name: str
    bits: int
    low: int
    high: int
    group: int | None
    signed_scale: bool = False
    levels: tuple[float, ...] | None = None

    @property
    def scale_dtype(self) -> str:
        """In which a scale is exact, as numpy writes it."""
        return "<f2" if self.levels is None else "<f4"

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the rows of a matrix of `shape` divide into whole groups."""
        return self.group is None or shape[1] % self.group == 0

    def groups(self, columns: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else columns // self.group

    def bits_per_weight(self, columns: int) -> float:
        """Bits of codes and scales for each weight in a row of `columns` inputs."""
        return self.bits + 8 * np.dtype(self.scale_dtype).itemsize * self.groups(columns) / columns

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Bytes of packed codes and scales for a matrix of `shape`."""
        rows, columns = shape
        scales = np.dtype(self.scale_dtype).itemsize * self.groups(columns)
        return rows * (-(-columns * self.bits // 8) + scales)


INT4_G32 = Grid("int4-g32", bits=4, low=-8, high=7, group=32)
INT4_G32_SIGNED = Grid("int4-g32-signed", bits=4, low=-8, high=7, group=32, signed_scale=True)
INT8_ROW = Grid("int8-row", bits=8, low=-127, high=127, group=None)
INT8_G32 = Grid("int8-g32", bits=8, low=-127, high=127, group=32)
INT2_G64 = Grid("int2-g64", bits=2, low=-1, high=2, group=64)
INT2_G256 = Grid("int2-g256", bits=2, low=-1, high=2, group=256)
# QLoRA's NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), the numbers of bitsandbytes.
NF4_G64 = Grid(
    "nf4-g64",
    bits=4,
    low=-8,
    high=7,
    group=64,
    levels=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
GRIDS = {
    grid.name: grid
    for grid in (INT4_G32, INT4_G32_SIGNED, INT8_ROW, INT8_G32, INT2_G64, INT2_G256, NF4_G64)
}


def round_scale(scale: Float32) -> Float32:
    """Round scales to 8 significant bits within what bf16 and fp16 both hold exactly.

    Magnitudes are kept between SCALE_FLOOR and SCALE_CEILING; the sign is kept; an exact zero
    (an all-zero group) becomes 1. Round half to even. Any shape, float32 in and out.
    """
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    value = rounded.view(np.float32)
    magnitude = np.clip(np.abs(value), SCALE_FLOOR, SCALE_CEILING)
    return np.where(scale == 0, np.float32(1), np.copysign(magnitude, value)).astype(np.float32)
