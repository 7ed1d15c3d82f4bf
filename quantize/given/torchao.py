"""Checkpoints of torchao's IntxWeightOnlyConfig at 4 bits, as transformers saves them.

For a weight of `out` rows and `in` columns: `_weight_qdata` int8 (out, in), codes from -8 to 7 that
are not packed; `_weight_scale` and int8 `_weight_zero_point` (out, in / group). A weight is
(q - z) * scale. torchao's other tensors of 4 bits have zero points that are floats, or an order
that their kernels want.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..grid import Grid
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, grid_of, inconsistent, shape_of

MAKER = "torchao"
_CONFIG = "IntxWeightOnlyConfig"
_SUFFIX = "._weight_qdata"


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other.
        Unsupported: another configuration, or a grid that nothing holds.
    """
    given = settings.get("quant_type")
    default = given.get("default") if isinstance(given, dict) else None
    kind = default.get("_type") if isinstance(default, dict) else given
    data = default.get("_data") if isinstance(default, dict) else None
    bits = (data.get("weight_dtype") or {}).get("_data") if isinstance(data, dict) else None
    if kind != _CONFIG or bits != "int4":
        raise Unsupported(
            f"a torchao checkpoint of {kind}, {bits or 'other'} weights",
            f"slimport reads {_CONFIG} of int4: whole zero points, weights alone",
            FULL_PRECISION,
        )
    stems = [name.removesuffix(_SUFFIX) for name in checkpoint.names() if name.endswith(_SUFFIX)]
    return {f"{stem}.weight": _entry(checkpoint, stem) for stem in stems}


def _entry(checkpoint: Checkpoint, stem: str) -> Entry:
    parts = tuple(f"{stem}._weight_{part}" for part in ("qdata", "scale", "zero_point"))
    (rows, columns), scales, zeros = (shape_of(checkpoint, part) for part in parts)
    if scales != zeros or scales[0] != rows or not scales[1] or columns % scales[1]:
        raise inconsistent(parts[0], f"its scales are {scales}, its zero points {zeros}")
    zero = checkpoint.integers(parts[2])
    symmetric = not zero.any()
    group = columns // scales[1]
    grid = grid_of(stem, 4, group, columns, checkpoint.rows(parts[1]), symmetric, -8)
    return Entry((rows, columns), parts, grid, partial(_load, checkpoint, parts, grid))


def _load(checkpoint: Checkpoint, parts: tuple[str, ...], grid: Grid) -> QuantizedTensor:
    codes, zero = (checkpoint.integers(part) for part in (parts[0], parts[2]))
    if max(-int(codes.min()), int(codes.max()) + 1, -int(zero.min()), int(zero.max()) + 1) > 8:
        raise inconsistent(parts[0], "it has codes or zero points of more than 4 bits")
    groups = codes.reshape(*zero.shape, -1) - zero[:, :, None]
    centred = np.ascontiguousarray(groups.reshape(codes.shape), np.int8)
    return QuantizedTensor(grid, centred, checkpoint.rows(parts[1]))
