"""What a code means: value = level * scale, a scale per group of inputs or per output row.

The level of a code is the code itself, but for grids with a codebook.

What others write as (q - z) * scale, with a zero point z per group, is the same here: the code is
q - z. How many codes lie between the smallest and the largest one of a group is what bounds the
bits, and where counting starts is no part of a weight: `zero_points` says it for containers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

UInt8 = npt.NDArray[np.uint8]

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
        scale_bits: significant bits of a scale: 8 are exact in bfloat16 and in float16, 11 in
            float16 alone, 24 in float32.
        asymmetric: whether groups have zero points: the codes of a group, and 0, then lie within
            2 ** bits - 1 of each other, anywhere between `low` and `high`.
        levels: what the codes from `low` on stand for; None: for themselves. A scale is then the
            largest magnitude of its group, as it is in float32.
    """

    name: str
    bits: int
    low: int
    high: int
    group: int | None
    signed_scale: bool = False
    scale_bits: int = 8
    asymmetric: bool = False
    levels: tuple[float, ...] | None = None

    @property
    def scale_dtype(self) -> str:
        """In which a scale is exact, as numpy writes it."""
        return "<f2" if self.scale_bits <= 11 else "<f4"

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the rows of a matrix of `shape` divide into whole groups."""
        return self.group is None or shape[1] % self.group == 0

    def groups(self, columns: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else columns // self.group

    def bits_per_weight(self, columns: int) -> float:
        """Bits of codes, zero points and scales for each weight in a row of `columns` inputs."""
        zero_point = self.bits if self.asymmetric else 0
        each = 8 * np.dtype(self.scale_dtype).itemsize + zero_point
        return self.bits + each * self.groups(columns) / columns

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Bytes of packed codes, zero points and scales for a matrix of `shape`."""
        rows, columns = shape
        scales = np.dtype(self.scale_dtype).itemsize * self.groups(columns)
        zero_points = -(-self.groups(columns) * self.bits // 8) if self.asymmetric else 0
        return rows * (-(-columns * self.bits // 8) + zero_points + scales)

    def zero_points(self, codes: Int8) -> UInt8:
        """What makes the codes of every group count from 0 on: uint8 (rows, groups).

        The smallest number that leaves none of them, and no zero point, below 0.
        """
        rows, columns = codes.shape
        groups = codes.reshape(rows, self.groups(columns), -1)
        points: UInt8 = (-groups.min(-1, initial=0).astype(np.int16)).astype(np.uint8)
        return points


_GROUPS = {"g16": 16, "g32": 32, "g64": 64, "g128": 128, "row": None}
_LINEAR = {"int4": (4, -8, 7, False), "uint4": (4, -15, 15, True), "int8": (8, -127, 127, False)}


def _linear(kind: str, group: str) -> tuple[Grid, Grid]:
    """A grid whose scales every container may hold, and one with whatever others wrote."""
    bits, low, high, asymmetric = _LINEAR[kind]
    portable = Grid(f"{kind}-{group}", bits, low, high, _GROUPS[group], asymmetric=asymmetric)
    lowest = -128 if bits == 8 else low
    name = f"{portable.name}-f16"
    return portable, replace(portable, name=name, low=lowest, signed_scale=True, scale_bits=11)


LINEAR = {g.name: g for kind in _LINEAR for group in _GROUPS for g in _linear(kind, group)}
INT4_G32, INT8_ROW, INT8_G32 = (LINEAR[name] for name in ("int4-g32", "int8-row", "int8-g32"))
INT4_G32_SIGNED = replace(INT4_G32, name="int4-g32-signed", signed_scale=True)
INT3_G64 = Grid("int3-g64", bits=3, low=-4, high=3, group=64)
INT2_G64 = Grid("int2-g64", bits=2, low=-1, high=2, group=64)
INT2_G256 = Grid("int2-g256", bits=2, low=-1, high=2, group=256)
# QLoRA's NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), the numbers of bitsandbytes.
NF4_G64 = Grid(
    "nf4-g64",
    bits=4,
    low=-8,
    high=7,
    group=64,
    scale_bits=24,
    levels=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
# bitsandbytes' float of 4 bits: a sign, two bits of exponent, one of mantissa, over 12.
_FP4 = tuple(float(np.float32(level / 12)) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3))
FP4_G64 = replace(NF4_G64, name="fp4-g64", levels=(*_FP4, *(-level for level in _FP4)))
_OTHERS = (INT4_G32_SIGNED, INT3_G64, INT2_G64, INT2_G256, NF4_G64, FP4_G64)
GRIDS = LINEAR | {grid.name: grid for grid in _OTHERS}


def listed(names: Iterable[str]) -> str:
    """Grids for people: those that differ in group alone as one, `int4-{g32,g64}[-f16]`."""
    given = list(names)
    found = []
    for kind in _LINEAR:
        groups = [group for group in _GROUPS if f"{kind}-{group}" in given]
        wide = groups and all(f"{kind}-{group}-f16" in given for group in groups)
        if len(groups) > 1:
            found.append(f"{kind}-{{{','.join(groups)}}}{'[-f16]' if wide else ''}")
            shown = {f"{kind}-{group}{end}" for group in groups for end in ("", "-f16")}
            given = [name for name in given if name not in shown or ("-f16" in name and not wide)]
    return ", ".join([*found, *given])


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
