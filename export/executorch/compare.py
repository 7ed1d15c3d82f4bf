"""A finished file against the quantized checkpoint it was made from, weight by weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...architectures import Kind, Weight
from ...errors import ValidationFailed
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import ReadBack
from ..readback import compare_weights, float_error
from .reader import File, looked_up, open_file, unpack


def check(model: QuantizedCheckpoint, folder: Path, threads: int = 2) -> ReadBack:
    """Read the file back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the file is malformed.
        DependencyMissing: ExecuTorch is not installed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    file = open_file(folder, model.decoder)

    def read(weight: Weight) -> QuantizedTensor | float:
        name, grid = weight.name, model.plan[weight.name].grid
        _require_stamp(file, name, model.records[name].digest)
        found = unpack(file, weight, model.decoder, grid.name if grid else None)
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


def _require_stamp(file: File, name: str, digest: str) -> None:
    """ValidationFailed if the keys of a weight are those of another: programs may share by them."""
    stamp = file.stamps.get(name, "")
    if not stamp or not digest.startswith(stamp):
        raise ValidationFailed(
            f"{name}: the file does not hold what was quantized",
            f"its keys end in {stamp or 'nothing'}, and its digest begins with {digest[:16]}",
            "export again; if it stays, report it with the model's config.json",
        )
