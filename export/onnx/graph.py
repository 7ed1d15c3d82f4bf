"""A small vocabulary for ONNX graphs: inputs, stored tensors, constants, operators, outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..layout import INT4, Stored
from .layout import FLOAT16, FLOAT32, Float

CONTRIB = "com.microsoft"  # onnxruntime's own operators, ContribOperators.md
OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
OPSETS = {"": OPSET, CONTRIB: CONTRIB_OPSET}
DATA = "model.onnx.data"

Shape = Sequence[int | str]
Tensor = ir.TensorProtocol
TYPES = {
    INT4: ir.DataType.INT4,
    "|i1": ir.DataType.INT8,
    "|u1": ir.DataType.UINT8,
    FLOAT16: ir.DataType.FLOAT16,
    FLOAT32: ir.DataType.FLOAT,
}
_WORDS: dict[Float, str] = {FLOAT16: "float16", FLOAT32: "float32"}


class Graph:
    """A graph that grows in the order in which it runs.

    Values are onnx_ir's; an operator is named after what it computes, so that a profile of the
    finished model can be read.

    Args:
        data: the file of stored tensors, beside the model.
        opsets: {domain: version} of the operators.
    """

    def __init__(self, data: str = DATA, opsets: Mapping[str, int] = OPSETS) -> None:
        self._data, self._opsets = data, dict(opsets)
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._names: dict[str, int] = {}
        self._made: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        """A value that every run must be given."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional(self, name: str, default: npt.NDArray[Any], shape: Shape) -> ir.Value:
        """A value that a run may be given; `default` where it is not."""
        tensor = ir.tensor(default, name=name)
        value = self.input(name, tensor.dtype, shape)
        value.const_value = tensor
        self._initializers[name] = value
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Shape) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def stored(self, tensor: Stored) -> ir.Value:
        """A tensor of the data file."""
        return self._initializer(
            ir.ExternalTensor(
                self._data,
                tensor.offset,
                tensor.nbytes,
                TYPES[tensor.dtype],
                shape=ir.Shape(tensor.shape),
                name=tensor.name,
            )
        )

    def constant(self, value: npt.NDArray[Any], name: str) -> ir.Value:
        """A few numbers inside the model file; equal names are one constant."""
        return self._initializer(ir.tensor(value, name=name))

    def integers(self, *values: int) -> ir.Value:
        """int64 (n,), such as a shape."""
        return self.constant(np.array(values, np.int64), f"int64:{','.join(map(str, values))}")

    def real(self, value: float, dtype: Float) -> ir.Value:
        """A number without dimensions: float32, or rounded to float16 when the model is loaded."""
        name = f"float32:{np.float32(value)!s}"
        number = self.constant(np.array(value, np.float32), name)
        return self.cast(number, FLOAT32, dtype, name)

    def cast(self, x: ir.Value, found: Float, wanted: Float, name: str) -> ir.Value:
        """x, whose type is `found`, as `wanted`; what is equal stays as it is."""
        if found == wanted:
            return x
        name = f"{name}.{_WORDS[wanted]}"
        return self.once(name, lambda: self.op("Cast", x, name=name, to=int(TYPES[wanted]))[0])

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """One node; `name` gets a number if it is taken. None is an input that is left out."""
        count = self._names[name] = self._names.get(name, -1) + 1
        name = f"{name}.{count}" if count else name
        node = ir.Node(
            domain,
            kind,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=name,
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def remove(self, node: ir.Node) -> None:
        """Take back a node whose outputs nothing reads."""
        self._nodes.remove(node)

    def once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` gives, made the first time that `name` is asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def serialize(self, name: str, properties: dict[str, str]) -> bytes:
        """The model file: everything but the tensors of the data file."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            name=name,
            opset_imports=self._opsets,
        )
        model = ir.Model(
            graph, ir_version=IR_VERSION, producer_name="slimport", metadata_props=properties
        )
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return content

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        if tensor.name not in self._initializers:
            assert tensor.name is not None
            self._initializers[tensor.name] = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return self._initializers[tensor.name]
