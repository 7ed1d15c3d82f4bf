"""Checkpoints of AWQ in AutoAWQ's layout for matrix products ("gemm").

For a weight of `out` rows and `in` columns: `qweight` int32 (in, out / 8), `qzeros` int32
(in / group, out / 8), `scales` (in / group, out). A word holds eight outputs, low bits first, in
the order 0, 2, 4, 6, 1, 3, 5, 7. A weight is (q - z) * scale (AWQ: arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..grid import Float32, Grid, UInt8
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, fields, grid_of, inconsistent, shape_of

MAKER = "AWQ"
_SUFFIX = ".qweight"
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of the outputs 0 to 7 in a word


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other.
        Unsupported: another layout, other bits than 4, or a grid that nothing holds.
    """
    layout, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits")
    if layout != "gemm" or bits != 4:
        raise Unsupported(
            f"an AWQ checkpoint of version {layout} and {bits} bits",
            "slimport reads version gemm of 4 bits, which AutoAWQ writes by default",
            FULL_PRECISION,
        )
    stems = [name.removesuffix(_SUFFIX) for name in checkpoint.names() if name.endswith(_SUFFIX)]
    return {f"{stem}.weight": _entry(checkpoint, stem) for stem in stems}


def _entry(checkpoint: Checkpoint, stem: str) -> Entry:
    columns, words = shape_of(checkpoint, f"{stem}.qweight")
    groups, rows = shape_of(checkpoint, f"{stem}.scales")
    packed = shape_of(checkpoint, f"{stem}.qzeros")
    if not groups or columns % groups or rows != 8 * words or packed != (groups, words):
        why = f"its scales are {(groups, rows)}, its zero points {packed}"
        raise inconsistent(f"{stem}.qweight {(columns, words)}", why)
    symmetric = bool((_unpacked(checkpoint, f"{stem}.qzeros") == 8).all())
    scale = _scale(checkpoint, stem)
    grid = grid_of(stem, 4, columns // groups, columns, scale, symmetric, -8)
    parts = tuple(f"{stem}.{part}" for part in ("qweight", "qzeros", "scales"))
    return Entry((rows, columns), parts, grid, partial(_load, checkpoint, stem, grid))


def _load(checkpoint: Checkpoint, stem: str, grid: Grid) -> QuantizedTensor:
    codes, zero = (_unpacked(checkpoint, f"{stem}.{part}") for part in ("qweight", "qzeros"))
    groups = codes.reshape(*zero.shape, -1) - zero[:, :, None]  # wraps round
    return QuantizedTensor(
        grid, groups.view(np.int8).reshape(codes.shape), _scale(checkpoint, stem)
    )


def _unpacked(checkpoint: Checkpoint, name: str) -> UInt8:
    """uint8 (outputs, inputs or groups)"""
    words = checkpoint.integers(name).view(np.uint32)
    each = fields(words, 4)[:, :, _PLACES].reshape(len(words), -1)
    return np.ascontiguousarray(each.T)


def _scale(checkpoint: Checkpoint, stem: str) -> Float32:
    return np.ascontiguousarray(checkpoint.rows(f"{stem}.scales").T)
