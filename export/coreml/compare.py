"""Finished packages against the quantized checkpoint they were made from, weight by weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...architectures import Weight
from ...quantize.blocks import Quantized
from ...quantize.store import QuantizedCheckpoint
from ..container import ReadBack
from ..readback import compare_weights, float_error
from .reader import File, require_program, unpack


def check(
    model: QuantizedCheckpoint, files: Sequence[File], vectors: str = "<f4", threads: int = 2
) -> ReadBack:
    """Read packages back and compare every code, scale, level and value with `model`.

    Args:
        vectors: the type of norms and biases.

    Raises:
        BadInput: a package is malformed, or Apple's library reads it otherwise.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    require_program(files, model.decoder)

    def read(weight: Weight) -> Quantized | float:
        name, grid = weight.name, model.plan[weight.name].grid
        found = unpack(files, weight, grid.name if grid else None)
        if not isinstance(found, np.ndarray):
            return found
        return float_error(name, "<f2" if weight.is_matrix else vectors, found, model.rows(name))

    return compare_weights(model, read, threads)
