"""Checkpoints of MLX (mlx-lm) in mode "affine".

For a weight of `out` rows and `in` columns: `weight` uint32 (out, in * bits / 32), low bits first;
`scales` and `biases` (out, in / group). A weight is q * scale + bias. MLX puts the end of a group
that is farthest from 0 on a code, so a bias is nearly, and rarely exactly, a multiple of the scale:
where all are, they are zero points; else ggml's Q4_1 holds the very sum, in GGUF alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..blocks import BLOCK_GRIDS, BlockTensor
from ..grid import Float32, Grid, UInt8
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, fields, grid_of, inconsistent, shape_of

MAKER = "MLX"
_SUFFIX = ".scales"
_BLOCK = 32  # weights of one of Q4_1


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other.
        Unsupported: another mode, other bits than 4, or scales that nothing holds.
    """
    mode, bits = settings.get("mode", "affine"), settings.get("bits")
    mixed = [key for key, value in settings.items() if isinstance(value, dict)]
    if mode != "affine" or bits != 4 or mixed:
        raise Unsupported(
            f"an MLX checkpoint of mode {mode}, {bits} bits"
            + (f", and others for {mixed[0]}" if mixed else ""),
            "slimport reads affine ones of 4 bits, the same for all weights",
            FULL_PRECISION,
        )
    stems = [name.removesuffix(_SUFFIX) for name in checkpoint.names() if name.endswith(_SUFFIX)]
    return {f"{stem}.weight": _entry(checkpoint, stem) for stem in stems}


def _entry(checkpoint: Checkpoint, stem: str) -> Entry:
    rows, words = shape_of(checkpoint, f"{stem}.weight")
    columns = words * 8
    shapes = {shape_of(checkpoint, f"{stem}.{part}") for part in ("scales", "biases")}
    groups = shapes.pop()[1]
    if shapes or not groups or columns % groups or checkpoint.shape(f"{stem}.scales")[0] != rows:
        raise inconsistent(f"{stem}.weight {(rows, words)}", "its scales or biases do not fit it")
    parts = tuple(f"{stem}.{part}" for part in ("weight", "scales", "biases"))
    scale, bias = (checkpoint.rows(part) for part in parts[1:])
    zero = _zeros(scale, bias)
    if zero is not None:
        symmetric = bool((zero == 8).all())
        grid = grid_of(stem, 4, columns // groups, columns, scale, symmetric, -8)
        return Entry((rows, columns), parts, grid, partial(_load, checkpoint, stem, grid))
    if columns // groups % _BLOCK or not (_is_half(scale) and _is_half(bias)):
        raise Unsupported(
            f"{stem}: its biases are no multiples of its scales",
            f"only blocks of {_BLOCK} weights with a scale and a bias in float16 hold such a sum",
            FULL_PRECISION,
        )
    load = partial(_blocks, checkpoint, stem)
    return Entry((rows, columns), parts, BLOCK_GRIDS["Q4_1"], load)


def _is_half(values: Float32) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def _zeros(scale: Float32, bias: Float32) -> UInt8 | None:
    """Zero points, where every bias is minus a whole number of scales; else None."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = np.nan_to_num(np.rint(-bias / scale), posinf=99, neginf=99)
    if ((zero < 0) | (zero > 15)).any() or not np.array_equal(-zero * scale, bias):
        return None
    found: UInt8 = zero.astype(np.uint8)
    return found


def _codes(checkpoint: Checkpoint, stem: str) -> UInt8:
    words = checkpoint.integers(f"{stem}.weight").view(np.uint32)
    return fields(words, 4).reshape(len(words), -1)


def _load(checkpoint: Checkpoint, stem: str, grid: Grid) -> QuantizedTensor:
    codes = _codes(checkpoint, stem)
    scale, bias = (checkpoint.rows(f"{stem}.{part}") for part in ("scales", "biases"))
    zero = _zeros(scale, bias)
    assert zero is not None, "asked where they are whole"
    groups = (codes.reshape(*zero.shape, -1) - zero[:, :, None]).view(np.int8)  # wraps round
    return QuantizedTensor(grid, groups.reshape(codes.shape), scale)


def _blocks(checkpoint: Checkpoint, stem: str) -> BlockTensor:
    """Q4_1: fp16 scale and minimum, then 16 bytes; byte j holds codes j (low) and 16 + j."""
    codes = _codes(checkpoint, stem)
    rows, columns = codes.shape
    blocks = columns // _BLOCK
    parts = codes.reshape(rows * blocks, 2, _BLOCK // 2)
    nibbles = parts[:, 0] | parts[:, 1] << np.uint8(4)
    pair = [
        np.repeat(half, blocks // half.shape[1], axis=1).reshape(-1, 1).view(np.uint8)
        for half in (
            checkpoint.rows(f"{stem}.{part}").astype("<f2") for part in ("scales", "biases")
        )
    ]
    found = np.concatenate([*pair, nibbles], axis=1).reshape(rows, -1)
    return BlockTensor(BLOCK_GRIDS["Q4_1"], found)
