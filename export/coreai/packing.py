"""Codes, scales and floats as constants of a program, bit for bit: low bits of a byte first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import DecoderConfig
from ...architectures.rotation import turns
from ...errors import Unsupported
from ...quantize.floats import exact_half
from ...quantize.grid import GRIDS
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..coreml.packing import packed
from ..layout import Stored
from .layout import LEVELS, PLACES, ROPE, form_of

_CHUNK = 1 << 21  # weights packed at a time
_LARGEST = 65504  # of float16


def parts(tensor: Stored, model: QuantizedCheckpoint) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a constant, some rows at a time.

    Raises:
        Unsupported: a weight is beyond float16, in which a code is multiplied by its scale.
    """
    if not tensor.choices:
        yield _shared(tensor, model.decoder)
        return
    (choice,) = tensor.choices
    weight = model.load(choice.weight.name)
    if isinstance(weight, np.ndarray):
        yield np.ascontiguousarray(weight, "<f4")
        return
    assert isinstance(weight, QuantizedTensor), "layout refuses ggml's blocks and palettes"
    if tensor.part == "scale":
        yield _scale(choice.weight.name, weight, tensor.dtype)
        return
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield packed(weight.codes[start : start + step], form_of(choice).codes)


def _scale(name: str, weight: QuantizedTensor, dtype: str) -> npt.NDArray[Any]:
    if dtype == "<f4":
        return np.ascontiguousarray(weight.scale, dtype)
    grid = weight.grid
    largest = float(np.abs(weight.scale).max(initial=0)) * max(-grid.low, grid.high)
    if largest > _LARGEST:
        raise Unsupported(
            f"{name}: a weight may be as large as {largest:.6g}",
            f"Core AI multiplies code and scale in float16, which ends at {_LARGEST}",
            f'give it a grid with float32 scales: "{name}" = "int8-row"',
        )
    return np.ascontiguousarray(exact_half(weight.scale))


def _shared(tensor: Stored, config: DecoderConfig) -> npt.NDArray[Any]:
    """Levels of a grid, positions, or the table of a rope: cosines, sines (2, context, rotated)."""
    if tensor.name == PLACES:
        return np.arange(tensor.shape[0], dtype=tensor.dtype)
    if tensor.name.startswith(LEVELS):
        return np.array(GRIDS[tensor.name.removeprefix(LEVELS)].levels, "<f4")
    rope = config.attentions[int(tensor.name.removeprefix(ROPE))].rope
    assert rope is not None, "layout has no table without"
    pair = turns(rope, config.head_dim, tensor.shape[1])
    return np.ascontiguousarray([np.concatenate((half, half), 1) for half in pair], "<f4")
