"""Finished files against the quantized checkpoint they were made from, weight by weight.

Two witnesses, neither of which shares code with the packer: reader.py for every code and scale, and
ONNX Runtime's own DequantizeLinear for the values of the first inputs of each matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ...architectures import Weight
from ...quantize.grid import Float32
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import ReadBack
from ..onnx.compare import session_of
from ..readback import compare_weights, differs
from .reader import Files, Operand, matrix, vector

_INPUTS = 32  # of each matrix are dequantized by onnxruntime
ort.set_default_logger_severity(4)  # failures come as exceptions; their log lines are noise


def check(model: QuantizedCheckpoint, folder: Path, threads: int = 2) -> ReadBack:
    """Read the files back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the files are malformed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    files = Files(folder)

    def read(weight: Weight) -> QuantizedTensor | float:
        name, grid = weight.name, model.plan[weight.name].grid
        if not weight.is_matrix:
            return _rounding(files, weight, model)
        found = matrix(files, weight, model.decoder, grid.name if grid else None)
        if not weight.is_table or not model.decoder.tied:
            stem = name.removesuffix(".weight")
            if stem in files.graphs[0].nodes:  # an untied embedding is in no graph
                _agree_with_onnxruntime(name, files.operand(stem), found)
        return found

    return compare_weights(model, read, threads)


def _rounding(files: Files, weight: Weight, model: QuantizedCheckpoint) -> float:
    """Largest error of a norm or bias; more than half a step of its encoding is not allowed."""
    found, expected = vector(files, weight, model.decoder), model.rows(weight.name)
    errors = np.abs(found.values - expected)
    if (errors > 0.51 * found.step).any():  # the division is in float32
        raise differs(weight.name, "weight", found.values, expected)
    return float(errors.max(initial=0))


def _agree_with_onnxruntime(name: str, operand: Operand, found: QuantizedTensor) -> None:
    """Compare what the first inputs are multiplied by with what the kernel makes of their bytes."""
    theirs = dequantized(operand, min(_INPUTS, operand.shape[0]))
    ours = found.dequantize()[:, : theirs.shape[0]].T
    if not np.array_equal(ours, theirs):
        raise differs(name, "of the first inputs, value", theirs, np.ascontiguousarray(ours))


def dequantized(operand: Operand, inputs: int) -> Float32:
    """The values of the first inputs as DequantizeLinear computes them: float32 (inputs, rows)."""
    rows = operand.shape[1]
    kind = TensorProto.INT4 if operand.bits == 4 else TensorProto.INT8
    raw = operand.codes[: -(-inputs * rows * operand.bits // 8)].tobytes()
    codes = helper.make_tensor("codes", kind, [inputs, rows], raw, raw=True)
    scale = operand.scale[: -(-inputs // operand.block)] if operand.block else operand.scale
    settings: dict[str, Any] = {"axis": 1}
    if operand.block:
        settings = {"axis": 0, "block_size": operand.block}
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["codes", "scale"], ["values"], **settings)],
        "values",
        [],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, [inputs, rows])],
        [codes, numpy_helper.from_array(np.ascontiguousarray(scale), "scale")],
    )
    found: Float32 = session_of(graph, {"": 23}).run(None, {})[0]
    return found
