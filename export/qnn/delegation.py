"""How much of a graph the NPU took: what its context model leaves outside of its EPContext node."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError
from onnx.helper import tensor_dtype_to_np_dtype

from ...errors import BadInput

_CONTEXT = "EPContext"
_INT4 = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


class Delegated(NamedTuple):
    """Nodes and bytes of constants of a graph, and how many of them the NPU holds."""

    nodes: int
    npu_nodes: int
    weight_bytes: int
    npu_weight_bytes: int


def delegated(graph: Path, context: Path) -> Delegated:
    """Compare a graph with the context model that was compiled from it.

    Raises:
        BadInput: a file is missing or no model.
    """
    whole, left = _parse(graph), _parse(context)
    kinds = [node.op_type for node in left.node]
    if kinds.count(_CONTEXT) == 0:
        outside, bytes_left = len(whole.node), _constants(whole)
    else:
        outside, bytes_left = len(kinds) - kinds.count(_CONTEXT), _constants(left)
    nodes, stored = len(whole.node), _constants(whole)
    # What the CPU got may be split: never less than nothing is the NPU's.
    return Delegated(nodes, max(0, nodes - outside), stored, max(0, stored - bytes_left))


def _constants(graph: onnx.GraphProto) -> int:
    return sum(_bytes(tensor) for tensor in graph.initializer)


def _bytes(tensor: onnx.TensorProto) -> int:
    count: int = math.prod(tensor.dims)
    if tensor.data_type in _INT4:
        return -(-count // 2)
    return count * tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _parse(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load_model(path, load_external_data=False).graph
    except (OSError, ValueError, DecodeError) as error:
        raise BadInput(
            f"{path.name} cannot be read", str(error), "export the bundle again"
        ) from error
