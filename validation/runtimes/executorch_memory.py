"""Bytes that a program takes once it is loaded, as the program says."""

from __future__ import annotations

import math
from pathlib import Path

from ...export.executorch.decoder import FORWARD
from ...export.flatbuffer import Values
from ..runtime import Memory
from .executorch_program import Program, coded

_ROW = 12  # float32 scale, float32 bias and sum of a row's codes, packed with it
_UPDATE = "llama::update_cache"
_FLOAT = 4
_NONE = 2**32 - 1  # the external id of a value that stays inside of its graph


def memory(file: Path, weights: Path | None) -> Memory:
    """Memory of a program whose method `forward` is loaded.

    It is mapped, and so are the weights beside it. XNNPACK copies every matrix that it multiplies
    by into a layout of its own. The cache lies in the method's arena with what goes from graph to
    graph; what a graph computes for itself lies in a workspace that all graphs share. Both are for
    the longest run, a prompt as long as the context: models of 11M to 33M weights then gained 0.87
    to 1.18 times the sum of the anonymous parts, and less with shorter prompts.
    """
    program = Program.open(file, weights)
    method = program.method(FORWARD)
    cache = _cache(method)
    graphs = [program.graph(segment)[0] for segment in program.graphs(method)]
    return Memory(
        mapped=sum(path.stat().st_size for path in (file, weights) if path),
        repacked=sum(map(_packed, graphs)),
        kv_cache=cache,
        compute=sum(method["non_const_buffer_sizes"]) - cache + max(map(_workspace, graphs)),
    )


def _packed(graph: Values) -> int:
    """Bytes of a graph's matrices."""
    total = 0
    for matrix in coded(graph):
        if matrix.group is None:
            total += matrix.rows * (matrix.columns + _ROW)
        else:  # bfloat16 scales beside 4-bit codes
            groups = matrix.columns // matrix.group
            total += matrix.rows * (matrix.columns // 2 + 2 * groups + _ROW)
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    for node in graph["xnodes"]:
        kind, fields = node["xnode_union"]
        if kind == "XNNFullyConnected":
            weight, tensor = values[fields.get("filter_id", 0)]
            if weight == "XNNTensorValue":
                rows, columns = tensor["dims"]
                total += _FLOAT * rows * (columns + 1)
    return total


def _workspace(graph: Values) -> int:
    """Bytes of a graph's own values, as many as are needed at once."""
    sizes = {}
    for value in graph["xvalues"]:
        kind, fields = value["xvalue_union"]
        tensor = fields if kind == "XNNTensorValue" else fields["tensor_value"]
        if tensor.get("external_id", 0) == _NONE and not tensor.get("constant_buffer_idx"):
            width = _FLOAT if kind == "XNNTensorValue" else 1
            sizes[tensor.get("id_out", 0)] = width * math.prod(tensor["dims"])
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, node in enumerate(graph["xnodes"]):
        for name, value in node["xnode_union"][1].items():
            if name.endswith("_id") and value in sizes:
                last[value] = place
                first.setdefault(value, place)
    return max(
        (
            sum(sizes[value] for value in first if first[value] <= place <= last[value])
            for place in range(len(graph["xnodes"]))
        ),
        default=0,
    )


def _cache(method: Values) -> int:
    """Bytes of the tensors that the kernel for the cache writes to."""
    operators = [operator["name"] for operator in method["operators"]]
    held = set()
    for chain in method["chains"]:
        for instruction in chain["instructions"]:
            kind, call = instruction["instr_args"]
            if kind == "KernelCall" and operators[call.get("op_index", 0)] == _UPDATE:
                held.add(call["args"][1])
    sizes = (method["values"][index]["val"][1]["sizes"] for index in held)
    return sum(_FLOAT * math.prod(size) for size in sizes)
