"""Finished programs against the quantized checkpoint they were made from, weight by weight."""

from __future__ import annotations

import numpy as np

from ...architectures import Weight
from ...quantize.blocks import Quantized
from ...quantize.store import QuantizedCheckpoint
from ..container import ReadBack
from ..readback import compare_weights, float_error
from .reader import File, require_names, unpack


def check(model: QuantizedCheckpoint, file: File, threads: int = 2) -> ReadBack:
    """Read a program back and compare every code, scale and value with `model`.

    Raises:
        BadInput: a constant is missing or of another size.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    grids = {c.weight.name: c.grid.name for c in model.plan.choices if c.grid is not None}
    require_names(file, model.decoder, grids)

    def read(weight: Weight) -> Quantized | float:
        found = unpack(file, weight, grids.get(weight.name))
        if not isinstance(found, np.ndarray):
            return found
        return float_error(weight.name, "<f4", found, model.rows(weight.name))

    return compare_weights(model, read, threads)
