"""Graphs of fixed shapes for the NPU: float ones to observe, and the same on 16-bit integers.

Where encodings are given, what an operator makes goes through QuantizeLinear and DequantizeLinear,
inputs and outputs of the graph are integers, and no float tensor is left that the NPU would have to
hand to the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ...quantize.grid import Float32
from ..layout import Layout, Matrix
from ..onnx.graph import Graph
from .encoding import Encoding, Encodings, encoding_of

DATA = "model.data"
OPSET = 23  # RMSNormalization: taken apart, its rsqrt is computed wrong on the NPU
FLOAT = ir.DataType.FLOAT
_TYPES = {"uint16": ir.DataType.UINT16, "int16": ir.DataType.INT16}

Sizes = tuple[int, ...]


class Tensor(NamedTuple):
    """A float value under the name of its encoding."""

    name: str
    value: ir.Value
    shape: Sizes


class Static:
    """A graph under construction.

    Args:
        encodings: None: every tensor is float and an output, so that a run shows its range.

    Attributes:
        tied: pairs of tensors, one the other moved.
        caches: tensors that become int16.
        boundary: {input or result: tensor whose encoding it has}.
    """

    def __init__(self, placed: Layout, encodings: Encodings | None) -> None:
        self.graph = Graph(DATA, {"": OPSET})
        self.placed, self.encodings = placed, encodings
        self.tied: list[tuple[str, str]] = []
        self.caches: list[str] = []
        self.boundary: dict[str, str] = {}
        self._made: list[Tensor] = []

    def input(self, name: str, shape: Sizes) -> Tensor:
        self.boundary[name] = name
        if self.encodings is None:
            return Tensor(name, self.graph.input(name, FLOAT, shape), shape)
        codes = self.graph.input(name, _TYPES[self.encodings[name].dtype], shape)
        return Tensor(name, self._decoded(name, codes), shape)

    def cache(self, name: str, shape: Sizes) -> Tensor:
        """An input that holds keys or values of earlier tokens."""
        self.caches.append(name)
        return self.input(name, shape)

    def names(self) -> list[str]:
        """Every tensor that has an encoding: inputs, and what a float graph makes."""
        return [*self.boundary, *(made.name for made in self._made)]

    def outputs(self, results: Mapping[str, Tensor]) -> None:
        """End the graph with these results; a float one shows every tensor that it makes."""
        self.boundary |= {name: result.name for name, result in results.items()}
        if self.encodings is None:
            for made in self._made:
                self.graph.output(made.value, made.name, FLOAT, made.shape)
            return
        for name, result in results.items():
            decoder = result.value.producer()
            assert decoder is not None and decoder.inputs[0] is not None
            dtype = _TYPES[self.encodings[result.name].dtype]
            self.graph.output(decoder.inputs[0], name, dtype, result.shape)
            if not result.value.uses():
                self.graph.remove(decoder)

    def op(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Tensor | ir.Value],
        shape: Sizes,
        **settings: Any,
    ) -> Tensor:
        values = [x.value if isinstance(x, Tensor) else x for x in inputs]
        (made,) = self.graph.op(kind, *values, name=name, **settings)
        return self._held(name, made, shape)

    def move(
        self,
        kind: str,
        name: str,
        parts: list[Tensor],
        shape: Sizes,
        *more: ir.Value,
        **settings: Any,
    ) -> Tensor:
        """An operator that computes nothing: what comes out has the encoding of what went in."""
        for part in parts:
            self.tied.append((part.name, name))
        return self.op(kind, name, [*parts, *more], shape, **settings)

    def reshape(self, name: str, x: Tensor, *shape: int) -> Tensor:
        return self.move("Reshape", name, [x], shape, self.graph.integers(*shape))

    def transpose(self, name: str, x: Tensor, *order: int) -> Tensor:
        shape = tuple(x.shape[place] for place in order)
        return self.move("Transpose", name, [x], shape, perm=list(order))

    def part(self, name: str, x: Tensor, start: int, stop: int) -> Tensor:
        """[start:stop) of the last dimension."""
        places = (self.graph.integers(number) for number in (start, stop, len(x.shape) - 1))
        return self.move("Slice", name, [x], (*x.shape[:-1], stop - start), *places)

    def joined(self, name: str, parts: list[Tensor], axis: int) -> Tensor:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.move("Concat", name, parts, tuple(shape), axis=axis)

    def recoded(self, name: str, x: Tensor) -> Tensor:
        """The same values on another encoding."""
        if self.encodings is None:
            return self.op("Identity", name, [x], x.shape)
        return self._held(name, x.value, x.shape)

    def constant(self, name: str, values: Float32) -> Tensor:
        """A vector on an encoding of its own, inside the model file."""
        if self.encodings is None:
            return Tensor(name, self.graph.constant(values, name), values.shape)
        held = encoding_of(float(values.min()), float(values.max()))
        codes = self.graph.constant(held.encode(values), f"{name}.codes")
        return Tensor(name, self._dequantized(name, name, held, codes), values.shape)

    def linear(self, x: Tensor, matrix: Matrix, bias: Float32 | None = None) -> Tensor:
        """x @ weight.T + bias; the weights are the stored codes."""
        assert matrix.grid is not None, "layout refuses float matrices"
        codes, scale = (
            self.graph.stored(self.placed.by_name[f"{matrix.name}.{part}"])
            for part in ("codes", "scale")
        )
        group = matrix.grid.group
        settings: dict[str, Any] = {"axis": 1}
        if group is not None:
            settings = {"axis": 0, "block_size": group}
        (weight,) = self.graph.op(
            "DequantizeLinear", codes, scale, name=f"{matrix.name}.weight", **settings
        )
        shape = (*x.shape[:-1], matrix.shape[0])
        y = self.op("MatMul", matrix.name, [x, weight], shape)
        if bias is not None:
            added = self.constant(f"{matrix.name}.bias.values", bias)
            y = self.op("Add", f"{matrix.name}.bias", [y, added], shape)
        return y

    def scaled(self, name: str, x: Tensor, factor: float) -> Tensor:
        """x * factor; nothing is computed for 1."""
        if factor == 1:
            return x
        values = self.constant(f"{name}.factor", np.array([factor], np.float32))
        return self.op("Mul", name, [x, values], x.shape)

    def _held(self, name: str, made: ir.Value, shape: Sizes) -> Tensor:
        if self.encodings is None:
            self._made.append(Tensor(name, made, shape))
            return self._made[-1]
        scale, zero = self._numbers(self.encodings.leader(name), self.encodings[name])
        (codes,) = self.graph.op("QuantizeLinear", made, scale, zero, name=f"{name}.codes")
        return Tensor(name, self._decoded(name, codes), shape)

    def _decoded(self, name: str, codes: ir.Value) -> ir.Value:
        assert self.encodings is not None
        return self._dequantized(name, self.encodings.leader(name), self.encodings[name], codes)

    def _dequantized(self, name: str, group: str, held: Encoding, codes: ir.Value) -> ir.Value:
        numbers = self._numbers(group, held)
        return self.graph.op("DequantizeLinear", codes, *numbers, name=f"{name}.float")[0]

    def _numbers(self, group: str, held: Encoding) -> tuple[ir.Value, ir.Value]:
        """Scale and zero of an encoding, stored once for a group of tensors."""
        return (
            self.graph.constant(np.array(held.scale, np.float32), f"{group}.encoding.scale"),
            self.graph.constant(np.array(held.zero, held.dtype), f"{group}.encoding.zero"),
        )
