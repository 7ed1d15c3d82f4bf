"""Checkpoints of bitsandbytes at 4 bits, as transformers saves them (QLoRA, arXiv:2305.14314).

`weight` uint8 (rows * columns / 2, 1): two codes to a byte, the first in its high bits; `absmax`
float32, a scale for each 64 weights without regard to rows; `quant_map` float32 (16,), the levels.
Double quantization: `absmax` is uint8, places in `nested_quant_map` (256,), times `nested_absmax`
for each 256 of them, plus the offset that stands in the JSON of `quant_state`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..grid import GRIDS, Float32, Grid
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, inconsistent, shape_of

MAKER = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other.
        Unsupported: 8 bits, other blocks than 64, blocks across rows, or unknown levels.
    """
    if settings.get("load_in_8bit") or not settings.get("load_in_4bit"):
        raise Unsupported(
            "a bitsandbytes checkpoint that is not of 4 bits",
            "LLM.int8 keeps scales that are divided by 127, which no container holds exactly",
            FULL_PRECISION,
        )
    found = {}
    for name in checkpoint.names():
        weight, separator, kind = name.partition(_STATE)
        if separator:
            found[weight] = _entry(checkpoint, weight, kind)
    return found


def _entry(checkpoint: Checkpoint, name: str, kind: str) -> Entry:
    state = _state(checkpoint, f"{name}{_STATE}{kind}")
    grid = GRIDS.get(f"{kind}-g64")
    if kind not in _KINDS or grid is None or state.get("blocksize") != 64:
        raise Unsupported(
            f"{name}: {kind} in blocks of {state.get('blocksize')} is not held",
            f"slimport has {' and '.join(_KINDS)} in blocks of 64, bitsandbytes' own default",
            FULL_PRECISION,
        )
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise inconsistent(name, f"its shape is said to be {shape}")
    rows, columns = (int(size) for size in shape)
    if not grid.fits((rows, columns)):
        raise Unsupported(
            f"{name}: rows of {columns} do not divide into blocks of 64",
            "bitsandbytes' blocks reach over the ends of rows, and containers' do not",
            FULL_PRECISION,
        )
    if checkpoint.shape(name) != (rows * columns // 2, 1):
        raise inconsistent(name, f"its codes are {checkpoint.shape(name)} for {shape}")
    shape_of(checkpoint, f"{name}.quant_map", 1)
    levels = checkpoint.rows(f"{name}.quant_map")
    if not np.array_equal(levels, np.array(grid.levels, np.float32)):
        raise Unsupported(
            f"{name}: its levels are not those of {kind}",
            "a grid has fixed levels, and each container stores these",
            FULL_PRECISION,
        )
    parts = tuple(part for part in checkpoint.names() if part.startswith(f"{name}."))
    load = partial(_load, checkpoint, name, grid, (rows, columns), state)
    return Entry((rows, columns), (name, *parts), grid, load)


def _load(
    checkpoint: Checkpoint,
    name: str,
    grid: Grid,
    shape: tuple[int, int],
    state: Mapping[str, Any],
) -> QuantizedTensor:
    packed = checkpoint.integers(name)
    codes = np.empty((packed.size, 2), np.uint8)
    codes[:, 0], codes[:, 1] = packed[:, 0] >> 4, packed[:, 0] & 15
    centred = codes.view(np.int8).reshape(shape) + np.int8(grid.low)
    scale = _scale(checkpoint, name, state)
    if scale.shape != (packed.size // 32,):
        raise inconsistent(f"{name}.absmax", f"it has {scale.size} scales for {packed.size} bytes")
    return QuantizedTensor(grid, centred, scale.reshape(shape[0], -1))


def _scale(checkpoint: Checkpoint, name: str, state: Mapping[str, Any]) -> Float32:
    """float32 (blocks,), computed in the order in which bitsandbytes does."""
    if "nested_offset" not in state:
        return checkpoint.rows(f"{name}.absmax")
    places = checkpoint.integers(f"{name}.absmax")
    levels = checkpoint.rows(f"{name}.nested_quant_map")
    largest = checkpoint.rows(f"{name}.nested_absmax")
    each = int(state.get("nested_blocksize", 256))
    whole = len(largest) == -(-len(places) // each)
    if levels.shape != (256,) or places.dtype != np.uint8 or not whole:
        raise inconsistent(f"{name}.absmax", "its own scales or levels do not fit it")
    scale: Float32 = levels[places] * np.repeat(largest, each)[: len(places)]
    scale += np.float32(state["nested_offset"])
    return scale


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    shape_of(checkpoint, name, 1)
    try:
        found = json.loads(checkpoint.integers(name).tobytes())
    except ValueError as error:
        raise inconsistent(name, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise inconsistent(name, "it is no JSON object")
    return found
