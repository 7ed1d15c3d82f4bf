"""What an ExecuTorch program means: itself, with every product in float32.

XNNPACK rounds the activations of a product with codes to 8 bits, always. Here each matrix of codes
becomes the float32 numbers that they stand for, and the rounding before it is left out. All else
is that of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EnvironmentFailed
from ...export import flatbuffer
from ...export.executorch import schema
from ...export.executorch.program import framed
from ...export.executorch.subgraph import with_header
from ...export.flatbuffer import Values
from ...export.layout import ALIGNMENT, padded
from ...quantize.grid import Float32
from .executorch_program import ROUNDED, Coded, Program, coded

_FP32 = 1  # of XNNDatatype
_CHUNK = 1 << 21  # weights that are computed at a time
_EXACT = ".exact"  # behind the key of codes: that of the numbers
_Segment = tuple[int, Iterable[npt.NDArray[Any]]]  # bytes, and the content in parts


def write(file: Path, out: Path, weights: Path | None = None) -> None:
    """Write the program of `file` in its exact form; it too shares `weights`.

    Raises:
        ValidationFailed: the file cannot be read.
        EnvironmentFailed: the disk is full.
    """
    program = Program.open(file, weights)
    values, segments = _exact(program)
    places, nbytes = [], 0
    for size, _ in segments:
        places.append({"offset": nbytes, "size": size})
        nbytes = padded(nbytes + size)
    head = framed(values | {"segments": places}, nbytes)
    try:
        with out.open("wb") as target:
            target.write(head)
            for size, parts in segments:
                for part in parts:
                    target.write(np.ascontiguousarray(part).data)
                target.write(bytes(-size % ALIGNMENT))
    except OSError as error:
        raise EnvironmentFailed(
            f"the exact form of {file.name} cannot be written: {error.strerror or error}",
            f"it needs {(len(head) + nbytes) / 1e9:.2f} GB of disk",
            "free that much",
        ) from error


def _exact(program: Program) -> tuple[Values, list[_Segment]]:
    """The flatbuffer, its segments left out, and these: graphs, constants, data by key."""
    plans = program.values["execution_plan"]
    graphs = sorted({segment for plan in plans for segment in program.graphs(plan)})
    segments: list[_Segment] = []
    named: dict[str, _Segment] = {}
    for segment in graphs:
        graph, constants = program.graph(segment)
        for matrix in coded(graph):
            nbytes = 4 * matrix.rows * matrix.columns
            named[matrix.codes + _EXACT] = nbytes, _Numbers(program, matrix)
        _widen(graph)
        for key in filter(None, (entry.get("named_key") for entry in graph["constant_data"])):
            if key not in named and key not in program.shared:
                named[key] = _copied(program.named(key))
        content = with_header(flatbuffer.encode(schema.XNNPACK, graph), constants)
        segments.append(_copied(np.frombuffer(content, np.uint8)))
    held = program.values["constant_segment"]
    moved = held | {"segment_index": len(segments)}
    segments.append(_copied(program.segment(held.get("segment_index", 0))))
    entries = [
        {"key": key, "segment_index": index} for index, key in enumerate(named, len(segments))
    ]
    segments += named.values()
    for plan in plans:
        for delegate in plan.get("delegates", []):
            processed = delegate["processed"]
            processed["index"] = graphs.index(processed.get("index", 0))
    return program.values | {"constant_segment": moved, "named_data": entries}, segments


def _widen(graph: Values) -> None:
    """Make every product of a graph one of float32 numbers."""
    constants = graph["constant_data"]
    for matrix in coded(graph):
        _, fields = graph["xvalues"][matrix.value]["xvalue_union"]
        tensor = fields["tensor_value"] | {"datatype": _FP32}
        graph["xvalues"][matrix.value]["xvalue_union"] = ("XNNTensorValue", tensor)
        entry = constants[tensor["constant_buffer_idx"]]
        size = 4 * matrix.rows * matrix.columns
        entry |= {"named_key": matrix.codes + _EXACT, "size": size}
    before: dict[int, int] = {}
    kept = []
    for node in graph["xnodes"]:
        kind, fields = node["xnode_union"]
        if kind == "XNNConvert":
            before[fields["output_id"]] = fields.get("input_id", 0)
        else:
            kept.append(node)
        if kind == "XNNFullyConnected":
            given = fields.get("input1_id", 0)
            fields["input1_id"] = before.get(given, given)
    graph["xnodes"] = kept
    for value in graph["xvalues"]:  # what is not made any more, and yet counted
        kind, fields = value["xvalue_union"]
        if kind == "XNNQuantizedTensorValue" and fields["quant_params"][0] == ROUNDED:
            tensor = fields["tensor_value"] | {"datatype": _FP32}
            value["xvalue_union"] = ("XNNTensorValue", tensor)


class _Numbers:
    """Rows of a matrix as what its codes mean, a few at a time."""

    def __init__(self, program: Program, matrix: Coded) -> None:
        self.program, self.matrix = program, matrix

    def __iter__(self) -> Iterator[Float32]:
        matrix = self.matrix
        codes = self.program.named(matrix.codes).reshape(matrix.rows, -1)
        scale = _scales(self.program.named(matrix.scale), matrix)
        step = max(1, _CHUNK // matrix.columns)
        for start in range(0, matrix.rows, step):
            part = codes[start : start + step]
            if matrix.group is None:
                levels = part.view(np.int8)
            else:
                pairs = np.stack([part & 15, part >> 4], -1)  # the even code first
                levels = pairs.reshape(len(part), -1).astype(np.int8) - np.int8(8)
            grouped = levels.reshape(len(part), scale.shape[1], -1).astype(np.float32)
            yield (grouped * scale[start : start + step, :, None]).reshape(len(part), -1)


def _scales(data: npt.NDArray[np.uint8], matrix: Coded) -> Float32:
    """float32 (rows, groups); beside 4-bit codes the file has bfloat16."""
    if matrix.group is None:
        return data.view("<f4").reshape(matrix.rows, -1)
    bits = data.view("<u2").astype(np.uint32) << 16
    return bits.view(np.float32).reshape(matrix.rows, -1)


def _copied(data: npt.NDArray[np.uint8]) -> _Segment:
    return data.size, [data]
