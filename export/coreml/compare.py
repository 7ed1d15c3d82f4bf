"""A finished package against the quantized checkpoint it was made from, weight by weight."""

from __future__ import annotations

from pathlib import Path

from ...architectures import Weight
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import ReadBack
from ..readback import compare_weights, float_error
from .reader import PACKAGE, File


def check(model: QuantizedCheckpoint, folder: Path, threads: int = 2) -> ReadBack:
    """Read the package back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the package is malformed, or Apple's library reads it otherwise.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    file = File(folder / PACKAGE)
    file.require_program(model.decoder)

    def read(weight: Weight) -> QuantizedTensor | float:
        name, grid = weight.name, model.plan[weight.name].grid
        found = file.unpack(weight, grid.name if grid else None)
        if isinstance(found, QuantizedTensor):
            return found
        return float_error(name, "<f2" if weight.is_matrix else "<f4", found, model.rows(name))

    return compare_weights(model, read, threads)
