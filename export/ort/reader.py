"""An independent reader: `model.ort` back to codes, scales and source names.

Shares no code with what writes the file: it is parsed by the classes that flatbuffers' compiler
made from onnxruntime's schema, and what its operators are given is read as in model.onnx. A hostile
file is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ...errors import BadInput
from ..onnx.reader import MODEL as ONNX_MODEL
from ..onnx.reader import File
from .tools import generated

MODEL = "model.ort"
_Read = TypeVar("_Read")
_MOST, _FEW = 100_000, 64  # nodes or tensors of a graph; inputs, attributes or sizes of one
_LONGEST = 4096  # bytes of a name
_DECODED = 1 << 24  # of all nodes; offsets may lead to the same bytes again and again
_INTEGER = 2  # of a flatbuffer's AttributeType
_I = 12  # of Attribute's vtable: where `i` lies
_RAW_DATA = 12  # of Tensor's
_BEYOND = (struct.error, IndexError, OverflowError, TypeError, ValueError, AttributeError)
_DTYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.FLOAT16: np.dtype("<f2"),
    onnx.TensorProto.UINT8: np.dtype("|u1"),
}


def open_file(folder: Path) -> File:
    """`model.ort` in `folder`, as the reader of model.onnx has it.

    Raises:
        BadInput: it cannot be read.
    """
    with _malformed(), named():
        data = _mapped(folder / MODEL)
        model = _root(data).Model()
        graph = model.Graph()
        nodes = _named(graph, "Nodes", _node)
        tensors = _named(graph, "Initializers", lambda each: _view(each, data))
        stored = {name: view for name, view in tensors.items() if view is not None}
        said = {_text(each.Key()): _text(each.Value()) for each in _each(model, "MetadataProps")}
        return File(list(nodes.values()), stored, said)


def at_accuracy_level(path: Path, level: int) -> bytes:
    """The file with another `accuracy_level` at every product that states one.

    Memory: the whole file, which ONNX Runtime is given as bytes.
    """
    with _malformed():
        data = np.memmap(path, np.uint8, "c")
        for node in _each(_root(data).Model().Graph(), "Nodes", _MOST):
            for attribute in _each(node, "Attributes"):
                if attribute.Name() == b"accuracy_level":
                    offset = attribute._tab.Offset(_I)
                    if not offset:
                        raise ValueError(f"{_text(node.Name())} states no accuracy level")
                    struct.pack_into("<q", data.data, attribute._tab.Pos + offset, level)
        return data.tobytes()


@contextmanager
def named() -> Iterator[None]:
    """Errors of the reader of model.onnx, with the name of this file."""
    try:
        yield
    except BadInput as error:
        what = error.what.replace(ONNX_MODEL, MODEL)
        raise BadInput(what, error.why, error.cure) from error


@contextmanager
def _malformed() -> Iterator[None]:
    """What the generated classes raise at offsets that lead nowhere, as BadInput."""
    try:
        yield
    except (OSError, *_BEYOND) as error:
        raise BadInput(
            f"{MODEL} is not the model that it should be",
            f"it cannot be read: {error}",
            "export it again",
        ) from error


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r")


def _root(data: npt.NDArray[np.uint8]) -> Any:
    session = generated().InferenceSession.InferenceSession
    content = data.data  # flatbuffers compares slices
    if not session.InferenceSessionBufferHasIdentifier(content, 0):
        raise ValueError("it is no file of the ORT format")
    return session.GetRootAsInferenceSession(content, 0)


def _each(table: Any, field: str, most: int = _FEW) -> Iterator[Any]:
    """The elements of a vector."""
    count = getattr(table, f"{field}Length")()
    if count > most:
        raise ValueError(f"it has {count} {field}")
    return (getattr(table, field)(index) for index in range(count))


def _named(graph: Any, field: str, read: Callable[[Any], _Read]) -> dict[str, _Read]:
    """What `read` makes of nodes or tensors, by their names."""
    found: dict[str, _Read] = {}
    decoded = 0
    for each in _each(graph, field, _MOST):
        name, value = _text(each.Name()), read(each)
        decoded += len(name) + (value.ByteSize() if isinstance(value, onnx.NodeProto) else 0)
        if name in found or decoded > _DECODED:
            raise ValueError(f"{name} stands twice, or its {field} have over {_DECODED} bytes")
        found[name] = value
    return found


def _text(name: bytes) -> str:
    if len(name) > _LONGEST:
        raise ValueError(f"a name has {len(name)} bytes")
    return name.decode()


def _node(node: Any) -> onnx.NodeProto:
    """A node with those of its attributes that are integers."""
    found = helper.make_node(
        _text(node.OpType()),
        [_text(name) for name in _each(node, "Inputs")],
        [_text(name) for name in _each(node, "Outputs")],
        name=_text(node.Name()),
        domain=_text(node.Domain()),
    )
    for attribute in _each(node, "Attributes"):
        if attribute.Type() == _INTEGER:
            found.attribute.append(helper.make_attribute(_text(attribute.Name()), attribute.I()))
    return found


def _view(tensor: Any, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | None:
    """A tensor within the file; None for a constant of the graph, which is no weight."""
    dtype = _DTYPES.get(tensor.DataType())
    shape = tuple(int(size) for size in _each(tensor, "Dims"))
    if dtype is None or min(shape, default=0) < 1:  # a number has no size
        return None
    offset = tensor._tab.Offset(_RAW_DATA)
    if not offset:
        raise ValueError(f"{_text(tensor.Name())} has no data")
    start, length = tensor._tab.Vector(offset), tensor._tab.VectorLen(offset)
    if length != math.prod(shape) * dtype.itemsize or start + length > len(data):
        raise ValueError(
            f"{_text(tensor.Name())} of shape {shape} has {length} bytes from {start} on,"
            f" of {len(data)}"
        )
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
