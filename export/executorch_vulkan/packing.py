"""Codes, scales and floats into the tensors of the file, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures.rotation import turns
from ...quantize.grid import Grid
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..executorch import packing
from ..executorch.embedding import LOOKUP
from ..executorch.layout import ROPE
from ..layout import Stored
from .layout import OFFSET


def parts(tensor: Stored, model: QuantizedCheckpoint) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor, some rows at a time."""
    if tensor.name.startswith(OFFSET):
        yield np.full(tensor.shape, model.decoder.family.norm_offset, "<f4")
    elif tensor.name.startswith(ROPE):
        _, index, which = tensor.name.split(".")
        rope = model.decoder.ropes[int(index)]
        half = turns(rope, model.decoder.head_dim, tensor.shape[0])[which == "sin"]
        yield np.ascontiguousarray(np.concatenate((half, half), 1), "<f4")
    elif tensor.part == "scale" and _is_product(tensor):
        yield _across(tensor, model)
    else:
        yield from packing.parts(tensor, model)


def _is_product(tensor: Stored) -> bool:
    """Whether a tensor is of a matrix of 4-bit codes that the GPU multiplies by."""
    grid = tensor.choices[0].grid
    return isinstance(grid, Grid) and grid.bits == 4 and LOOKUP not in tensor.name


def _across(tensor: Stored, model: QuantizedCheckpoint) -> npt.NDArray[Any]:
    """Scales of groups, (groups, rows): those of the rows that the name says."""
    (choice,) = tensor.choices
    weight = model.load(choice.weight.name)
    assert isinstance(weight, QuantizedTensor), "layout refuses ggml's blocks"
    _, _, rows = tensor.name.removesuffix("]").partition(".scale[")
    start = int(rows.partition(":")[0]) if rows else 0
    return np.ascontiguousarray(weight.scale[start : start + tensor.shape[1]].T, "<f4")
