"""A finished file against the quantized checkpoint it was made from, weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...architectures import Kind, Weight
from ...errors import ValidationFailed
from ...quantize.grid import Float32
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import ReadBack
from ..readback import compare_weights, float_error
from .held import Held, looked_up
from .reader import open_file, unpack

Unpack = Callable[[Weight, str | None], QuantizedTensor | Float32]


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Read the file back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the file is malformed.
        DependencyMissing: ExecuTorch is not installed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    file = open_file(folder, model.decoder)
    return compare(model, file, lambda weight, grid: unpack(file, weight, model.decoder, grid))


def compare(model: QuantizedCheckpoint, file: Held, unpacked: Unpack, threads: int = 2) -> ReadBack:
    """As `check`, of any container's program.

    Args:
        unpacked: reads a weight of the file, on the grid of this name or, without one, in float32.
    """

    def read(weight: Weight) -> QuantizedTensor | float:
        name, grid = weight.name, model.plan[weight.name].grid
        _require_stamp(file, name, model.records[name].digest)
        found = unpacked(weight, grid.name if grid else None)
        if isinstance(found, QuantizedTensor):
            return found
        expected, error = model.rows(name), 0.0
        if weight.kind is Kind.EMBEDDING:
            table = looked_up(file, weight, None)
            assert isinstance(table, np.ndarray), "it has no grid"
            error = float_error(name, "<f2", table, expected)
            if not model.decoder.tied:
                return error
        return max(error, float_error(name, "<f4", found, expected))

    return compare_weights(model, read, threads)


def _require_stamp(file: Held, name: str, digest: str) -> None:
    """ValidationFailed if the keys of a weight are those of another: programs may share by them."""
    stamp = file.stamps.get(name, "")
    if not stamp or not digest.startswith(stamp):
        raise ValidationFailed(
            f"{name}: the file does not hold what was quantized",
            f"its keys end in {stamp or 'nothing'}, and its digest begins with {digest[:16]}",
            "export again; if it stays, report it with the model's config.json",
        )
