"""Where everything lies in `model.ort`: tables first, then each tensor behind its length.

The tensors are those of export/onnx/layout.py, with scales and float matrices as float32. ONNX
Runtime optimizes no file of this format when it loads it, so a Cast of a stored tensor would run
for each token, and MatMulNBits gives zeros for scales that are not constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import Kind
from ...errors import Unsupported
from ...quantize.store import QuantizedCheckpoint
from ..flatbuffer import Blob
from ..layout import ALIGNMENT, Stored
from ..onnx import packing
from ..onnx.layout import GraphLayout

_LENGTH = np.dtype("<u4")  # before the content of each tensor
_LARGEST = 2**31 - 1  # a flatbuffer
_TABLES = 1 << 24  # more than the tables of any model take
_HALF, _SINGLE = "<f2", "<f4"


def widened(stored: GraphLayout) -> GraphLayout:
    """The layout with float32 for float16, but for a table that is only looked up."""
    table = stored.matrices[None, Kind.EMBEDDING]
    kept = f"{table.name}.weight" if (None, Kind.HEAD) in stored.matrices else None
    tensors = (
        replace(tensor, dtype=_SINGLE) if tensor.dtype == _HALF and tensor.name != kept else tensor
        for tensor in stored.tensors
    )
    return GraphLayout(stored.matrices.values(), tensors)


def blobs(placed: GraphLayout) -> dict[int, Blob]:
    """Where each tensor of `model.ort` lies behind the tables, by its offset in `placed`."""
    return {
        tensor.offset: Blob(tensor.offset + ALIGNMENT * (index + 1), tensor.nbytes)
        for index, tensor in enumerate(placed.tensors)
    }


def data_bytes(placed: GraphLayout) -> int:
    """Of all tensors, each filled up to the alignment, and a block with its length before it."""
    return placed.nbytes + ALIGNMENT * len(placed.tensors)


def data(
    model: QuantizedCheckpoint, stored: GraphLayout, placed: GraphLayout
) -> Iterator[tuple[str, int, Iterable[npt.NDArray[Any]]]]:
    """Name, bytes and content of every tensor of `placed`, which is `stored` widened."""
    for narrow, wide in zip(stored.tensors, placed.tensors, strict=True):
        start = np.zeros(ALIGNMENT // _LENGTH.itemsize, _LENGTH)
        start[-1] = wide.nbytes
        yield wide.name, ALIGNMENT + wide.nbytes, chain([start], _content(model, narrow, wide))


def refuse_size(size: int) -> None:
    """Raise Unsupported if `size` bytes of tensors do not fit."""
    if size > _LARGEST - _TABLES:
        raise Unsupported(
            f"the ORT format cannot hold a model of {size / 1e9:.1f} GB",
            f"its files are flatbuffers, which end at {_LARGEST / 1e9:.1f} GB",
            "write ONNX, whose weights lie in a file of their own: --container onnx",
        )


def _content(
    model: QuantizedCheckpoint, narrow: Stored, wide: Stored
) -> Iterator[npt.NDArray[Any]]:
    if not narrow.choices:
        return packing.rope_parts(narrow, model.decoder)
    parts = packing.parts(narrow, model)
    return (part.astype(_SINGLE) for part in parts) if wide.dtype != narrow.dtype else parts
