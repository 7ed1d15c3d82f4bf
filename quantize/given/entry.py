"""One weight that others quantized: which grid it is on, and its codes when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...checkpoint import Checkpoint
from ...errors import BadInput, Unsupported
from ..blocks import AnyGrid, Quantized
from ..grid import GRIDS, Float32, Grid, UInt8, round_scale

FULL_PRECISION = "export the full-precision model that it was made from"
_NAMED = {16: "g16", 32: "g32", 64: "g64", 128: "g128"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A quantized weight of somebody's checkpoint.

    Attributes:
        shape: (rows, columns) of the weight.
        parts: the stored tensors that it is made of.
        load: its codes and scales, in source row order; reads and unpacks all of it.
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]
    grid: AnyGrid
    load: Callable[[], Quantized]


def fields(words: npt.NDArray[np.uint32], bits: int) -> UInt8:
    """What words are packed of, low bits first: uint32 (...) to uint8 (..., 32 / bits)."""
    octets = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(*words.shape, 4)
    each = 8 // bits
    found = np.empty((*octets.shape, each), np.uint8)
    for place in range(each):
        np.right_shift(octets, np.uint8(bits * place), out=found[..., place])
    found &= np.uint8((1 << bits) - 1)
    return found.reshape(*words.shape, 32 // bits)


def grid_of(
    name: str, bits: int, group: int, columns: int, scale: Float32, symmetric: bool, lowest: int
) -> Grid:
    """The grid that holds (q - z) * scale exactly.

    Args:
        group: inputs that share a scale; as many as `columns` for one scale per row.
        scale: float32, all of them.
        symmetric: whether every zero point is the middle of the codes.
        lowest: the smallest q - z, or a bound below it.

    Raises:
        Unsupported: there is none.
    """
    if bits == 8 and not symmetric:
        raise nine_bits(name)
    if bits not in (4, 8):
        raise Unsupported(
            f"{name}: codes of {bits} bits of others are not read",
            "slimport carries codes of 4 and of 8 bits on",
            FULL_PRECISION,
        )
    ending = "row" if group == columns else _NAMED.get(group)
    if ending is None:
        raise Unsupported(
            f"{name}: {group} inputs share a scale, of {columns}",
            f"grids have groups of {', '.join(map(str, _NAMED))}, and whole rows",
            FULL_PRECISION,
        )
    stem = ("int8" if bits == 8 else "int4" if symmetric else "uint4") + f"-{ending}"
    portable, wide = GRIDS[stem], GRIDS[f"{stem}-f16"]
    if lowest >= portable.low and (scale > 0).all() and (scale == round_scale(scale)).all():
        return portable
    with np.errstate(over="ignore"):
        exact = scale.astype(np.float16).astype(np.float32) == scale
    if not exact.all():
        raise Unsupported(
            f"{name}: {np.count_nonzero(~exact)} of its scales are not exact in float16",
            "containers hold float16 scales, and rounding one would change its weights",
            FULL_PRECISION,
        )
    return wide


def nine_bits(name: str) -> Unsupported:
    """What is raised for zero points beside codes of 8 bits."""
    return Unsupported(
        f"{name}: codes of 8 bits with zero points are not held",
        "less their zero points they need 9 bits, and no container here has those",
        FULL_PRECISION,
    )


def shape_of(checkpoint: Checkpoint, name: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of a stored tensor.

    Raises:
        BadInput: it is missing, or has another number of dimensions.
    """
    if name not in checkpoint.tensors:
        raise inconsistent(name, "it is missing")
    shape = checkpoint.shape(name)
    if len(shape) != rank:
        raise inconsistent(name, f"its shape is {shape}")
    return shape


def inconsistent(name: str, why: str) -> BadInput:
    return BadInput(
        f"{name} is not as a quantized model stores it",
        why,
        "download the model again, all files from one revision",
    )
