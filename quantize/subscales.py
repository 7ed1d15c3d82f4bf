"""Where k-quants keep the scales of their sub-blocks (block layouts: ggml's `ggml-common.h`).

A sub-block's scale is a small number times the float16 scale that the super-block shares; its
minimum, of the types that have one, is minus a small number times the shared minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .ggml import Type, UInt8
from .grid import Float32

Int16 = npt.NDArray[np.int16]
SUPER = 256  # weights of a super-block


class Layout(NamedTuple):
    """What differs between types.

    Attributes:
        first: the code that is stored as 0; below 0: scales have a sign, there are no minimums.
        limits: the smallest and largest small number.
        shared: the byte of the shared scale and, if there is one, that of the shared minimum.
        put: writes small scales and minimums (super-blocks, sub-blocks) into blocks.
    """

    first: int
    limits: tuple[int, int]
    shared: tuple[int, ...]
    put: Callable[[UInt8, Int16, Int16], None]

    @property
    def signed(self) -> bool:
        return self.first < 0

    def write(
        self,
        blocks: UInt8,
        small: tuple[Int16, Int16],
        shared: tuple[Float32, Float32],
    ) -> None:
        """Small and shared scales, small and shared minimums into blocks (super-blocks, bytes)."""
        self.put(blocks, *small)
        for byte, values in zip(self.shared, shared, strict=False):
            blocks[:, byte : byte + 2] = values.astype("<f2")[:, None].view(np.uint8)


def _put_4_bits(blocks: UInt8, scale: Int16, low: Int16) -> None:
    blocks[:, :16] = scale | low << 4


def _put_6_bits(blocks: UInt8, scale: Int16, low: Int16) -> None:
    """The first four of each whole, the high bits of the last four beside them."""
    blocks[:, 4:8] = scale[:, :4] | scale[:, 4:] >> 4 << 6
    blocks[:, 8:12] = low[:, :4] | low[:, 4:] >> 4 << 6
    blocks[:, 12:16] = scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4


def _put_signed_6_bits(blocks: UInt8, scale: Int16, low: Int16) -> None:
    """Plus 32: low bits of scale i and i + 8 in byte i, then high bits of four in a byte."""
    raised = scale + 32
    blocks[:, 96:104] = raised[:, :8] & 15 | (raised[:, 8:] & 15) << 4
    high = (raised >> 4).reshape(-1, 4, 4)
    blocks[:, 104:108] = (high << np.array([[0], [2], [4], [6]])).sum(1)


def _put_8_bits(blocks: UInt8, scale: Int16, low: Int16) -> None:
    blocks[:, 192:208] = scale.astype(np.int8).view(np.uint8)


LAYOUTS = {
    Type.Q2_K: Layout(0, (0, 15), (80, 82), _put_4_bits),
    Type.Q3_K: Layout(-4, (-32, 31), (108,), _put_signed_6_bits),
    Type.Q4_K: Layout(0, (0, 63), (0, 2), _put_6_bits),
    Type.Q5_K: Layout(0, (0, 63), (0, 2), _put_6_bits),
    Type.Q6_K: Layout(-32, (-128, 127), (208,), _put_8_bits),
}
