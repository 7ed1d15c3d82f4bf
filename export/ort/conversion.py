"""From a graph of export/onnx to the tables of `model.ort`, by ONNX Runtime without the weights.

ONNX Runtime converts the graph with its weights as inputs: it chooses kernels, types and fused
operators, and neither reads nor folds nor copies a weight. They are then entered as what they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime as ort
from onnx import helper

from .. import flatbuffer
from ..flatbuffer import Blob
from ..layout import ALIGNMENT
from .schema import SCHEMA
from .tools import format_tools, generated

# As ONNX Runtime does by itself for model.onnx, less what depends on the CPU that converts.
_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
_PROVIDERS = ["CPUExecutionProvider"]
_ONNX_DOMAIN = "ai.onnx"
_OPERATORS_HEADER = """\
# Operators of model.ort and the types that they are run with, for ONNX Runtime's build.py:
# --include_ops_by_config FILE --enable_reduced_operator_type_support
"""


class Converted(NamedTuple):
    """`model.ort` up to its tensors, and the list of its operators."""

    head: bytes
    operators: bytes


def convert(content: bytes, blobs: Mapping[int, Blob]) -> Converted:
    """Convert a model whose weights lie in a file of their own.

    Args:
        content: the ONNX file.
        blobs: {offset of a tensor in the file of weights: where it goes}.
    """
    model = onnx.load_model_from_string(content)
    weights = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        model.graph.initializer.remove(tensor)
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ort"
        _save(model, path)
        saved = path.read_bytes()
    session = flatbuffer.decode(SCHEMA, saved)
    graph = session["model"]["graph"]
    names = {tensor.name for tensor in weights}
    graph["inputs"] = [name for name in graph["inputs"] if name not in names]
    graph["initializers"] += [_stored(tensor, blobs) for tensor in weights]
    return Converted(flatbuffer.encode(SCHEMA, session, ALIGNMENT), _operators(saved))


def _save(model: onnx.ModelProto, path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVEL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(model.SerializeToString(), options, providers=_PROVIDERS)


def _stored(tensor: onnx.TensorProto, blobs: Mapping[int, Blob]) -> flatbuffer.Values:
    place = {
        entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
    }
    blob = blobs[place["offset"]]
    assert blob.nbytes == place["length"], tensor.name
    return {
        "name": tensor.name,
        "dims": list(tensor.dims),
        "data_type": tensor.data_type,
        "raw_data": blob,
    }


def _operators(content: bytes) -> bytes:
    """The lines of onnxruntime.tools' create_config_from_models, without the path of the model."""
    session = generated().InferenceSession.InferenceSession.GetRootAsInferenceSession(content, 0)
    graph = session.Model().Graph()
    values = [graph.NodeArgs(index) for index in range(graph.NodeArgsLength())]
    type_of = {value.Name(): value.Type() for value in values}
    types = format_tools().OperatorTypeUsageManager()
    required: dict[tuple[str, int], set[str]] = {}
    for index in range(graph.NodesLength()):
        node = graph.Nodes(index)
        place = node.Domain().decode() or _ONNX_DOMAIN, node.SinceVersion()
        required.setdefault(place, set()).add(node.OpType().decode())
        types.process_node(node, type_of)
    lines = []
    for (domain, opset), names in sorted(required.items()):
        entries = (f"{name}{types.get_config_entry(domain, name) or ''}" for name in sorted(names))
        lines.append(f"{domain};{opset};{','.join(entries)}\n")
    return (_OPERATORS_HEADER + "".join(lines)).encode()
