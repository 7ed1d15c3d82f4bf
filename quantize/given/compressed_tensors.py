"""Checkpoints of compressed-tensors (llm-compressor, vLLM) in format "pack-quantized".

For a weight of `out` rows and `in` columns: `weight_packed` int32 (out, in * bits / 32), codes plus
half of their range, low bits first; `weight_scale` (out, in / group); for asymmetric ones
`weight_zero_point` int32 (out * bits / 32, in / group), packed likewise along the rows;
`weight_shape` (2,); with act-order `weight_g_idx` (in,). A weight is (q - z) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..grid import Grid, Int8, UInt8
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, fields, grid_of, inconsistent, shape_of

MAKER = "compressed-tensors"
_SUFFIX = ".weight_packed"


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other.
        Unsupported: another format, activations that are quantized too, scattered groups, or a grid
            that nothing holds.
    """
    if settings.get("format") != "pack-quantized":
        raise Unsupported(
            f"a compressed-tensors checkpoint of format {settings.get('format')}",
            "slimport reads pack-quantized, integers of 4 and 8 bits",
            FULL_PRECISION,
        )
    groups = [group for group in (settings.get("config_groups") or {}).values() if group]
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        raise Unsupported(
            "a compressed-tensors checkpoint whose activations are quantized too",
            "runtimes here round activations in their own ways",
            FULL_PRECISION,
        )
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups}
    if len(bits) != 1 or not bits <= {4, 8}:
        raise Unsupported(
            f"a compressed-tensors checkpoint of {' and '.join(map(str, bits)) or 'unknown'} bits",
            "slimport reads 4 or 8 bits, the same for all weights",
            FULL_PRECISION,
        )
    stems = [name.removesuffix(_SUFFIX) for name in checkpoint.names() if name.endswith(_SUFFIX)]
    (each,) = bits
    assert isinstance(each, int), "4 or 8"
    return {f"{stem}.weight": _entry(checkpoint, stem, each) for stem in stems}


def _entry(checkpoint: Checkpoint, stem: str, bits: int) -> Entry:
    rows, words = shape_of(checkpoint, f"{stem}.weight_packed")
    _, groups = shape_of(checkpoint, f"{stem}.weight_scale")
    stated = checkpoint.integers(f"{stem}.weight_shape").tolist()
    columns = words * 32 // bits
    if stated != [rows, columns] or not groups or columns % groups:
        raise inconsistent(f"{stem}.weight_packed {(rows, words)}", f"it is said to be {stated}")
    scale = checkpoint.rows(f"{stem}.weight_scale")
    asymmetric = f"{stem}.weight_zero_point" in checkpoint.tensors
    packed = (rows * bits // 32, groups)
    if asymmetric and shape_of(checkpoint, f"{stem}.weight_zero_point") != packed:
        raise inconsistent(f"{stem}.weight_zero_point", f"its shape is not {packed}")
    if len(scale) != rows:
        raise inconsistent(f"{stem}.weight_scale", f"it has {len(scale)} rows")
    _refuse_scattered(checkpoint, stem, columns, groups)
    middle, lowest = 1 << (bits - 1), -(1 << (bits - 1))
    symmetric = not asymmetric or bool((_zeros(checkpoint, stem, bits) == middle).all())
    if symmetric and bits == 8:
        lowest = int(_codes(checkpoint, stem, bits).min()) - middle
    grid = grid_of(stem, bits, columns // groups, columns, scale, symmetric, lowest)
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    known = tuple(f"{stem}.{part}" for part in parts if f"{stem}.{part}" in checkpoint.tensors)
    return Entry((rows, columns), known, grid, partial(_load, checkpoint, stem, grid, asymmetric))


def _load(checkpoint: Checkpoint, stem: str, grid: Grid, asymmetric: bool) -> QuantizedTensor:
    codes, scale = _codes(checkpoint, stem, grid.bits), checkpoint.rows(f"{stem}.weight_scale")
    zero = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8)
    if asymmetric:
        zero = _zeros(checkpoint, stem, grid.bits)
    groups: Int8 = (codes.reshape(*zero.shape, -1) - zero[:, :, None]).view(np.int8)  # wraps round
    return QuantizedTensor(grid, groups.reshape(codes.shape), scale)


def _codes(checkpoint: Checkpoint, stem: str, bits: int) -> UInt8:
    """From 0 on, uint8 (rows, columns)."""
    words = checkpoint.integers(f"{stem}.weight_packed").view(np.uint32)
    return fields(words, bits).reshape(len(words), -1)


def _zeros(checkpoint: Checkpoint, stem: str, bits: int) -> UInt8:
    """From 0 on, uint8 (rows, groups)."""
    words = checkpoint.integers(f"{stem}.weight_zero_point").view(np.uint32)
    return np.ascontiguousarray(fields(words, bits).swapaxes(1, 2)).reshape(-1, words.shape[1])


def _refuse_scattered(checkpoint: Checkpoint, stem: str, columns: int, groups: int) -> None:
    name = f"{stem}.weight_g_idx"
    if name not in checkpoint.tensors:
        return
    found = checkpoint.integers(name)
    if (found == -1).all() or np.array_equal(found, np.arange(columns) // (columns // groups)):
        return
    raise Unsupported(
        f"{name}: inputs of a group do not lie side by side",
        'actorder "group" scattered them, and containers store no order',
        f'quantize it again with actorder "static", or {FULL_PRECISION}',
    )
