"""Where the codes of a ggml block stand (block layouts: ggml's `ggml-common.h`).

Within a group of a block, value = low + step * level[code]; low and step are what ggml's
dequantizer makes of the block's scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .ggml import Type
from .grid import Float32

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some bits of every code: `count` bits from bit `first` on, at `shift` in byte `byte`.

    `byte` and `shift` are int64 (weights of a block,).
    """

    byte: Indices
    shift: Indices
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a type.

    Attributes:
        group: weights that share low and step.
        levels: float32 (codes,), ascending; code c stands for levels[c] steps above low.
        even: whether the levels are 0, 1, 2 ...
    """

    group: int
    levels: Float32
    parts: tuple[_Part, ...]

    @property
    def even(self) -> bool:
        return bool(self.levels[1] == 1)


def _even(bits: int) -> Float32:
    return np.arange(2**bits, dtype=np.float32)


_I = np.arange(256)
_J = np.arange(32)
_HALF, _QUARTER = _I // 128, _I // 64
_NIBBLES = 4 * (_J // 16)  # the second half of a block of 32 stands in the high nibbles
# ggml's `kvalues_iq4nl`, from its lowest on.
_IQ4 = np.array(
    [0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240], np.float32
)

CODES = {
    Type.Q4_0: Codes(32, _even(4), (_Part(2 + _J % 16, _NIBBLES, 4),)),
    Type.Q4_1: Codes(32, _even(4), (_Part(4 + _J % 16, _NIBBLES, 4),)),
    Type.Q5_0: Codes(
        32, _even(5), (_Part(6 + _J % 16, _NIBBLES, 4), _Part(2 + _J // 8, _J % 8, 1, 4))
    ),
    Type.Q5_1: Codes(
        32, _even(5), (_Part(8 + _J % 16, _NIBBLES, 4), _Part(4 + _J // 8, _J % 8, 1, 4))
    ),
    Type.IQ4_NL: Codes(32, _IQ4, (_Part(2 + _J % 16, _NIBBLES, 4),)),
    Type.IQ4_XS: Codes(32, _IQ4, (_Part(8 + 16 * (_I // 32) + _I % 16, 4 * (_I % 32 // 16), 4),)),
    Type.Q2_K: Codes(16, _even(2), (_Part(16 + 32 * _HALF + _I % 32, 2 * (_I // 32 % 4), 2),)),
    Type.Q3_K: Codes(
        16,
        _even(3),
        (_Part(32 + 32 * _HALF + _I % 32, 2 * (_I // 32 % 4), 2), _Part(_I % 32, _I // 32, 1, 2)),
    ),
    Type.Q4_K: Codes(32, _even(4), (_Part(16 + 32 * _QUARTER + _I % 32, 4 * (_I // 32 % 2), 4),)),
    Type.Q5_K: Codes(
        32,
        _even(5),
        (
            _Part(48 + 32 * _QUARTER + _I % 32, 4 * (_I // 32 % 2), 4),
            _Part(16 + _I % 32, _I // 32, 1, 4),
        ),
    ),
    Type.Q6_K: Codes(
        16,
        _even(6),
        (
            _Part(64 * _HALF + _I % 64, 4 * (_I % 128 // 64), 4),
            _Part(128 + 32 * _HALF + _I % 32, 2 * (_I % 128 // 32), 2, 4),
        ),
    ),
}
