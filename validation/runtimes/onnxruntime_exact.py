"""What an ONNX file means: its graph with every number in float32, changed in memory.

Tensors and structure stay those of the file. A graph in float16 also tells how large its numbers
get: the CPU provider computes neighbouring operators in float32 without rounding in between, and so
hides an overflow that a GPU would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...errors import ValidationFailed
from .onnxruntime import SESSION

LEVEL: int = SESSION["accuracy_level"]["exact_logits"]
_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
_LARGEST = float(np.finfo(np.float16).max)
_WIDE, PEAK = ".exact", ".peak"
_STATISTICS = {"SkipSimplifiedLayerNormalization": (1, 2)}  # outputs that the CPU does not compute


def exact(file: Path) -> bytes:
    """The model with every number in float32.

    Outputs are added at the end, their names those of values with PEAK behind: the largest
    magnitude of each value that the file has in float16.
    """
    model = onnx.load_model(file, load_external_data=False)
    halves = _halves(model.graph)
    for node in model.graph.node:
        _widen(node)
    _widen_ends(model.graph)
    for name in halves:
        _add_peak(model.graph, name)
    content: bytes = model.SerializeToString()
    return content


def refuse_overflow(peaks: Mapping[str, float]) -> None:
    """Raise ValidationFailed if one of {output: largest magnitude} is beyond float16."""
    for output, peak in peaks.items():
        if peak > _LARGEST:
            operator = output.removesuffix(PEAK).partition(":")[0]
            raise ValidationFailed(
                f"{operator} computes numbers that do not fit float16",
                f"they reach {peak:.6g} and float16 ends at {_LARGEST:.0f}: a GPU would make them"
                " infinite, whatever the CPU shows",
                "keep activations in float32: --container onnx",
            )


def _halves(graph: onnx.GraphProto) -> list[str]:
    """The values that operators make in float16: the first float that an operator takes says so."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        taken = [kind for name in node.input if (kind := kinds.get(name)) in (_HALF, _FLOAT)]
        made = _attribute(node, "to") if node.op_type == "Cast" else next(iter(taken), None)
        for index, name in enumerate(node.output):
            if name and made is not None and index not in _STATISTICS.get(node.op_type, ()):
                kinds[name] = made
    made_here = {name for node in graph.node for name in node.output}
    return [name for name, kind in kinds.items() if name in made_here and kind == _HALF]


def _widen(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = LEVEL
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == _HALF:
            attribute.i = _FLOAT


def _widen_ends(graph: onnx.GraphProto) -> None:
    """Stored tensors and factors of adapters behind a Cast; cache and logits as float32."""
    stored = [tensor.name for tensor in graph.initializer if tensor.data_type == _HALF]
    for node in graph.node:
        if node.op_type != "Cast":  # which takes any type
            _rename(node.input, {name: name + _WIDE for name in stored})
    casts = [helper.make_node("Cast", [n], [n + _WIDE], to=_FLOAT) for n in stored]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _HALF and value.name not in stored:
            value.type.tensor_type.elem_type = _FLOAT


def _rename(names: Any, new: Mapping[str, str]) -> None:
    for index, name in enumerate(names):
        names[index] = new.get(name, name)


def _add_peak(graph: onnx.GraphProto, name: str) -> None:
    peak, magnitude = name + PEAK, f"{name}.magnitude"
    graph.node.extend(
        (
            helper.make_node("Abs", [name], [magnitude]),
            helper.make_node("ReduceMax", [magnitude], [peak], keepdims=0),
        )
    )
    graph.output.append(helper.make_tensor_value_info(peak, _FLOAT, []))


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)
