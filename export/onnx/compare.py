"""Finished files against the quantized checkpoint they were made from, weight by weight.

Two witnesses, neither of which shares code with the packer: reader.py for every code and scale, and
ONNX Runtime's own kernels for the values of some rows of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, TensorProto, helper, numpy_helper

from ...architectures import Weight
from ...quantize.grid import Float32
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import ReadBack
from ..readback import compare_weights, differs, float_error
from .reader import File, Operand, find, unpack

_ROWS = 16  # of each weight are multiplied by onnxruntime
_STEP = 256  # inputs at a time
_EXACT = 1  # accuracy_level: float32 products
ort.set_default_logger_severity(4)  # failures come as exceptions; their log lines are noise


def check(model: QuantizedCheckpoint, file: File, threads: int = 2) -> ReadBack:
    """Read the files back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the files are malformed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """

    def read(weight: Weight) -> QuantizedTensor | float:
        name, grid = weight.name, model.plan[weight.name].grid
        found = unpack(file, weight, model.decoder, grid.name if grid else None)
        if isinstance(found, QuantizedTensor):
            _agree_with_onnxruntime(name, find(file, weight, model.decoder), found)
            return found
        dtype = "<f2" if weight.is_matrix else "<f4"
        return float_error(name, dtype, found, model.rows(name))

    return compare_weights(model, read, threads)


def _agree_with_onnxruntime(name: str, operand: Operand, found: QuantizedTensor) -> None:
    """Compare some rows, first and last among them, with what the kernel multiplies by one."""
    rows = np.unique(np.linspace(0, found.shape[0] - 1, _ROWS).astype(np.int64))
    chosen = QuantizedTensor(found.grid, found.codes[rows], found.scale[rows])
    ours, theirs = chosen.dequantize(), multiplied(operand, rows, found.shape[1])
    if not np.array_equal(ours, theirs):
        raise differs(name, f"of the rows {rows[0]}, {rows[1]} ... value", theirs, ours)


def multiplied(
    operand: Operand, rows: np.ndarray[tuple[int], np.dtype[np.int64]], columns: int
) -> Float32:
    """The values of some rows as the operator computes with them: float32 (rows, columns).

    It is given the unit vectors, at the accuracy level that multiplies in float32.
    """
    assert operand.scale is not None
    blocks = operand.scale.shape[1]
    tensors = {
        "codes": operand.codes[rows].reshape(len(rows), blocks, -1),
        "scale": operand.scale[rows].astype(np.float32),
    }
    if operand.zero_point is not None:
        tensors["zero_point"] = operand.zero_point[rows]
    settings: dict[str, Any] = {"bits": operand.bits, "accuracy_level": _EXACT}
    if operand.codebook:
        tensors = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        settings = {"quant_type": int(operand.codebook == "nf4-g64")}
    node = helper.make_node(
        "MatMulBnb4" if operand.codebook else "MatMulNBits",
        ["units", *tensors],
        ["values"],
        domain="com.microsoft",
        K=columns,
        N=len(rows),
        block_size=operand.block,
        **settings,
    )
    graph = helper.make_graph(
        [node],
        "rows",
        [helper.make_tensor_value_info("units", TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["n", len(rows)])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in tensors.items()],
    )
    session = session_of(graph, {"": 21, "com.microsoft": 1})
    found = np.empty((len(rows), columns), np.float32)
    for start in range(0, columns, _STEP):
        units = np.eye(min(_STEP, columns - start), columns, start, np.float32)
        found[:, start : start + _STEP] = session.run(None, {"units": units})[0].T
    return found


def session_of(graph: GraphProto, opsets: Mapping[str, int]) -> ort.InferenceSession:
    """A session on the CPU, in one thread; `opsets` by domain."""
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
