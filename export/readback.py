"""What the comparisons of all containers share: how a difference is found and said."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..architectures import Weight, weights
from ..errors import BadInput, SlimportError, ValidationFailed
from ..quantize.blocks import Quantized
from ..quantize.grid import Float32
from ..quantize.store import QuantizedCheckpoint
from ..quantize.tensor import weights_digest
from .container import ReadBack


def compare_weights(
    model: QuantizedCheckpoint, read: Callable[[Weight], Quantized | float], threads: int = 2
) -> ReadBack:
    """Read every weight of finished files and compare its digest with `model`.

    Memory: the codes of one weight per thread.

    Args:
        read: gives a quantized weight as the files hold it, or the largest error of a float one.

    Raises:
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    digests: dict[str, str] = {}
    errors: dict[str, float] = {}

    def one(weight: Weight) -> None:
        name, found = weight.name, read(weight)
        if isinstance(found, float):
            errors[name] = found
            return
        digests[name] = found.digest(name)
        if digests[name] != model.records[name].digest:
            raise difference(name, found, model.load(name))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, weights(model.decoder)))
    return ReadBack(weights_digest(digests), digests, dict(sorted(errors.items())))


def difference(name: str, found: Quantized, expected: Quantized | Float32) -> SlimportError:
    """Where two weights of different digests differ."""
    for what in ("blocks", "codes", "scale", "levels"):
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
