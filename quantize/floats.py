"""Numbers in float16: exact scales, and weights that are rounded to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import Unsupported
from .grid import Float32

Half = npt.NDArray[np.float16]
_LARGEST = 65504


def exact_half(scale: Float32) -> Half:
    """Scales as float16 of the same values.

    Raises:
        Unsupported: one is not exact in float16.
    """
    with np.errstate(over="ignore"):
        found: Half = scale.astype("<f2")
    if not np.array_equal(found.astype(np.float32), scale):
        raise Unsupported(
            "a scale is not exact in fp16",
            "containers hold fp16 scales, and rounding one would change its weights",
            "quantize again: slimport rounds scales to 8 significant bits before choosing codes",
        )
    return found


def half(name: str, weight: Float32) -> Half:
    """A weight rounded to float16, contiguous.

    Raises:
        Unsupported: it is beyond float16's largest number.
    """
    largest = float(np.abs(weight).max(initial=0))
    if not largest <= _LARGEST:
        raise Unsupported(
            f"{name}: its largest weight {largest:.6g} does not fit float16",
            f"float16 ends at {_LARGEST}, and nothing is clipped silently",
            "give this weight a grid, or export a model whose weights are in range",
        )
    return np.ascontiguousarray(weight, "<f2")
