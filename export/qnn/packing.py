"""Codes and scales into the tensors of the data file, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...quantize import packing
from ...quantize.grid import Int8
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..layout import INT4, Layout, Stored

Parts = Iterable[npt.NDArray[Any]]


def data(model: QuantizedCheckpoint, placed: Layout) -> Iterator[tuple[str, int, Parts]]:
    """Name, bytes and content of every tensor."""
    for tensor in placed.tensors:
        yield tensor.name, tensor.nbytes, _parts(tensor, model)


def _parts(tensor: Stored, model: QuantizedCheckpoint) -> Iterator[npt.NDArray[Any]]:
    (choice,) = tensor.choices
    weight = model.load(choice.weight.name)
    assert isinstance(weight, QuantizedTensor), "layout refuses everything else"
    if tensor.part == "scale":
        turned = weight.scale[:, 0] if weight.grid.group is None else weight.scale.T
        yield np.ascontiguousarray(turned, "<f4")
    else:
        yield pack(np.ascontiguousarray(weight.codes.T), tensor.dtype)


def pack(codes: Int8, dtype: str) -> npt.NDArray[Any]:
    """Codes (columns, rows) as ONNX stores them: int8, or int4 two to a byte without gaps.

    Rows 1, -2, 3 and -4, 5, 6 become the bytes 0xe1, 0xc3, 0x65: a byte may span two rows.
    """
    return packing.pack(codes.reshape(1, -1), 4) if dtype == INT4 else codes
