"""A small vocabulary for what XNNPACK computes: one graph that it is handed as a whole.

Everything follows XNNPACK's schema.fbs in ExecuTorch. Shapes are tuples of sizes, with TOKENS for
the number of tokens of a run and a multiple of it for a multiple of that; a shape has one of them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import flatbuffer
from ..layout import Stored
from . import schema

TOKENS = -1
Shape = tuple[int, ...]
Dtype = Literal["int8", "uint8", "int64", "float16", "float32"]
_FP32, _QC8, _QD8, _QB4 = 1, 6, 9, 10  # of XNNDatatype
_INPUT, _OUTPUT = 1, 2  # flags of a value
_TRANSPOSE_B = 1  # XNN_FLAG_TRANSPOSE_B
_NONE = 2**32 - 1  # XNN_INVALID_VALUE_ID
_NAMED = 2**64 - 1  # an offset, where a constant has a name instead
_ALIGNMENT = 16
_HEADER = struct.Struct("<4x4sHIIIQ")


class Value(NamedTuple):
    """A float32 tensor of the graph."""

    id: int
    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a method, by its index among the method's values."""

    index: int
    dtype: Dtype
    shape: Shape


class Subgraph:
    """A graph of XNNPACK that grows in the order in which it runs.

    Only weights and biases of products may be constants of it: ExecuTorch frees what a graph
    brings along once these are packed, and an operator that reads anything else then crashes.

    Args:
        tokens: of the longest run.
        keys: {stored tensor: its key in the .pte file}.

    Attributes:
        given: the tensors of its inputs, in their order.
    """

    BACKEND = "XnnpackBackend"

    def __init__(self, tokens: int, keys: Mapping[str, str]) -> None:
        self._tokens, self._keys = tokens, keys
        self.given: list[Tensor] = []
        self._nodes: list[flatbuffer.Values] = []
        self._values: list[flatbuffer.Values] = []
        self._constants: list[flatbuffer.Values] = [{"named_key": ""}]
        self._inline = b""
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []

    @property
    def results(self) -> list[Shape]:
        """Shapes of the outputs, in their order."""
        return [value.shape for value in self._outputs]

    def input(self, tensor: Tensor) -> Value:
        """What a run is given."""
        if tensor not in self.given:
            self.given.append(tensor)
            value = self._value(tensor.shape, flags=_INPUT, external_id=len(self._inputs))
            self._inputs.append(value)
        return self._inputs[self.given.index(tensor)]

    def computes(self, value: Value) -> bool:
        """Whether a value is not an input as it is."""
        return value not in self._inputs

    def output(self, *values: Value) -> None:
        """End with these values; called once."""
        self._outputs = list(values)
        for index, value in enumerate(values):
            known = self._values[value.id]["xvalue_union"][1]
            known |= {"flags": _OUTPUT, "external_id": len(self._inputs) + index}

    def weight(self, tensor: Stored) -> Value:
        """A float32 matrix or bias of the file, for a product."""
        return self._value(tensor.shape, constant_buffer_idx=self._constant(tensor))

    def op(self, kind: str, *inputs: Value) -> Value:
        """An operator on each element of one or two tensors, which are broadcast."""
        first, *others = inputs
        shape = first.shape
        for other in others:
            shape = broadcast(shape, other.shape)
        if others:
            names = {"input1_id": first.id, "input2_id": others[0].id}
        else:
            names = {"input_id": first.id}
        return self._node(kind, names, shape)

    def part(self, x: Value, start: int, stop: int) -> Value:
        """[start:stop) of the last dimension."""
        *before, last = x.shape
        if (start, stop) == (0, last):
            return x
        fields = {
            "num_dims": len(x.shape),
            "offsets": [0] * len(before) + [start],
            "sizes": [max(size, 0) for size in before] + [stop - start],
            "input_id": x.id,
        }
        return self._node("XNNStaticSlice", fields, (*before, stop - start))

    def joined(self, first: Value, second: Value) -> Value:
        """Side by side along the last dimension."""
        *before, last = first.shape
        fields = {"axis": len(before), "input1_id": first.id, "input2_id": second.id}
        return self._node("XNNConcatenate2", fields, (*before, last + second.shape[-1]))

    def transposed(self, x: Value, *order: int) -> Value:
        fields = {"num_dims": len(order), "perm": list(order), "input_id": x.id}
        return self._node("XNNStaticTranspose", fields, tuple(x.shape[place] for place in order))

    def matrices(self, first: Value, second: Value, *, transposed: bool = False) -> Value:
        """first @ second, or @ second.T, for each of their first dimension."""
        fields = {"input1_id": first.id, "input2_id": second.id}
        if transposed:
            fields["flags"] = _TRANSPOSE_B
        columns = second.shape[1 if transposed else 2]
        return self._node("XNNBatchMatrixMultiply", fields, (*first.shape[:-1], columns))

    def reshaped(self, x: Value, *shape: int) -> Value:
        sizes = [max(size, 0) for size in shape]
        fields = {"num_dims": len(shape), "new_shape": sizes, "input_id": x.id}
        return self._node("XNNStaticReshape", fields, shape)

    def mean(self, x: Value) -> Value:
        """Of the last dimension, which stays with one element: a product with 1 / size."""
        size = x.shape[-1]
        content = np.full((1, size), 1 / size, "<f4").tobytes()
        self._constants.append({"offset": len(self._inline), "size": len(content)})
        self._inline += content.ljust(-(-len(content) // _ALIGNMENT) * _ALIGNMENT, b"\0")
        return self.product(x, self._value((1, size), constant_buffer_idx=len(self._constants) - 1))

    def product(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        """x @ weight.T + bias, in float32; weight (outputs, inputs)."""
        return self._linear(x.id, x.shape, weight.id, weight.shape[0], bias)

    def quantized_product(
        self,
        x: Value,
        codes: Stored,
        scale: Stored,
        group: int | None,
        bias: Value | None = None,
    ) -> Value:
        """x @ weight.T + bias, x rounded to 8 bits with a scale and zero point for each token.

        Args:
            codes: (outputs, inputs); 8 bits, or 4 where there is a group.
            group: inputs that share a scale; None: a scale for each output.
        """
        rows, columns = codes.shape[0], x.shape[-1]
        rounded = self._quantized(
            x.shape, _QD8, ("PerTokenDynamicQuant", {"num_nonbatch_dims": 1}), {}
        )
        self._add("XNNConvert", {"input_id": x.id, "output_id": rounded})
        scales = {"scale": [], "scale_buffer_idx": self._constant(scale)}
        if group is None:
            means = ("PerChannelQuant", {**scales, "num_scales": rows})
        else:
            counts = {"group_size": group, "num_scales": rows * columns // group}
            means = ("PerChannelGroupQuant", {**scales, **counts})
        weight = self._quantized(
            (rows, columns),
            _QC8 if group is None else _QB4,
            means,
            {"constant_buffer_idx": self._constant(codes)},
        )
        return self._linear(rounded, x.shape, weight, rows, bias)

    def serialize(self) -> bytes:
        """What the backend is handed: a header, the graph, and the numbers inside of it."""
        graph = {
            "version": "0",
            "xnodes": self._nodes,
            "xvalues": self._values,
            "num_externs": len(self._inputs) + len(self._outputs),
            "input_ids": [value.id for value in self._inputs],
            "output_ids": [value.id for value in self._outputs],
            "constant_data": self._constants,
        }
        return with_header(flatbuffer.encode(schema.XNNPACK, graph), self._inline)

    def _linear(self, x: int, shape: Shape, weight: int, outputs: int, bias: Value | None) -> Value:
        fields = {"input1_id": x, "filter_id": weight, "bias_id": bias.id if bias else _NONE}
        return self._node("XNNFullyConnected", fields, (*shape[:-1], outputs))

    def _node(self, kind: str, fields: dict[str, Any], shape: Shape) -> Value:
        made = self._value(shape)
        self._add(kind, {**fields, "output_id": made.id})
        return made

    def _add(self, kind: str, fields: dict[str, Any]) -> None:
        node = {"xnode_union": (kind, fields), "debug_handle": len(self._nodes)}
        self._nodes.append(node)

    def _value(self, shape: Shape, **fields: int) -> Value:
        known = self._tensor(shape, _FP32, fields)
        self._values.append({"xvalue_union": ("XNNTensorValue", known)})
        return Value(known["id_out"], shape)

    def _quantized(
        self, shape: Shape, datatype: int, means: tuple[str, Any], fields: dict[str, int]
    ) -> int:
        known = self._tensor(shape, datatype, fields)
        value = {"tensor_value": known, "quant_params": means}
        self._values.append({"xvalue_union": ("XNNQuantizedTensorValue", value)})
        number: int = known["id_out"]
        return number

    def _tensor(self, shape: Shape, datatype: int, fields: dict[str, int]) -> dict[str, Any]:
        return {
            "datatype": datatype,
            "num_dims": len(shape),
            "dims": [size if size >= 0 else -size * self._tokens for size in shape],
            "external_id": _NONE,
            "id_out": len(self._values),
            **fields,
        }

    def _constant(self, tensor: Stored) -> int:
        """The place of a tensor of the file among the constants."""
        key = {"offset": _NAMED, "size": tensor.nbytes, "named_key": self._keys[tensor.name]}
        if key not in self._constants:
            self._constants.append(key)
        return self._constants.index(key)


def with_header(content: bytes, constants: bytes, magic: bytes = b"XH00") -> bytes:
    """What a backend is handed, of a graph as a flatbuffer and the numbers inside of it."""
    start = -(-_HEADER.size // _ALIGNMENT) * _ALIGNMENT
    end = start + -(-len(content) // _ALIGNMENT) * _ALIGNMENT
    header = _HEADER.pack(magic, _HEADER.size, start, len(content), end, len(constants))
    return header.ljust(start, b"\0") + content.ljust(end - start, b"\0") + constants


def broadcast(first: Shape, second: Shape) -> Shape:
    """The shape of what an operator makes of two tensors."""
    size = max(len(first), len(second))
    pairs = zip(
        (1,) * (size - len(first)) + first, (1,) * (size - len(second)) + second, strict=True
    )
    return tuple(b if a == 1 else a for a, b in pairs)
