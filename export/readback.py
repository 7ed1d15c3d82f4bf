"""What the comparisons of all containers share: how a difference is found and said."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, SlimportError, ValidationFailed
from ..quantize.blocks import Quantized
from ..quantize.grid import Float32


def difference(name: str, found: Quantized, expected: Quantized | Float32) -> SlimportError:
    """Where two weights of different digests differ."""
    for what in ("blocks", "codes", "scale"):
        ours, theirs = getattr(found, what, None), getattr(expected, what, None)
        if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
            return differs(name, what, ours, theirs)
    return BadInput(
        f"{name} is not what was quantized",
        "the quantized checkpoint changed since its digest was recorded",
        "quantize the model again",
    )


def float_error(name: str, dtype: str, found: Float32, expected: npt.NDArray[Any]) -> float:
    """Largest absolute error; nothing but rounding to the stored type is allowed."""
    rounded = expected.astype(dtype).astype(np.float32)
    if not np.array_equal(found, rounded):
        raise differs(name, "weight", found, rounded)
    return float(np.abs(found - expected).max(initial=0))


def differs(
    name: str, what: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]
) -> ValidationFailed:
    """The error that names the first element which is not what it should be."""
    place = tuple(np.argwhere(found != expected)[0])
    where = ", ".join(map(str, place))
    return ValidationFailed(
        f"{name}: the file does not hold what was quantized",
        f"{what} [{where}] reads {found[place]}, not {expected[place]}",
        "export again; if it stays, report it with the model's config.json",
    )
