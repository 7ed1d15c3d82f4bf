"""An independent reader: `model.onnx` and its data file back to codes, scales and source names.

Shares no code with layout.py, graph.py or packing.py and reads what the operators of the graph are
given, not what their tensors are called. Every length is checked against the data file before it is
used: a hostile file is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...errors import BadInput
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor

MODEL, DATA = "model.onnx", "model.onnx.data"
UInt8 = npt.NDArray[np.uint8]
_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "<f4",
    onnx.TensorProto.FLOAT16: "<f2",
    onnx.TensorProto.UINT8: "|u1",
}
_FLOAT = ("FusedMatMul", "Gather")
_CODEBOOK = "MatMulBnb4"
_CODEBOOKS = {0: "fp4-g64", 1: "nf4-g64"}  # by its quant_type
_QUANTIZED = ("MatMulNBits", "GatherBlockQuantized", _CODEBOOK)
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_BIAS = 5  # which input of MatMulNBits
_ADD_AND_NORM = "SkipSimplifiedLayerNormalization"


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix as an operator of the graph reads it; arrays are views of the data file.

    Attributes:
        codes: uint8 (rows, bytes of a row), or float16 or float32 (rows, columns).
        scale: (rows, blocks); None for a float matrix.
        zero_point: uint8 (rows, bytes); None where the operator takes 2 ** (bits - 1).
        bits, block: as the operator states them; 0 for a float matrix.
        codebook: whose codes they are, the first of a byte in its high bits; None: no codebook's.
    """

    codes: npt.NDArray[Any]
    scale: npt.NDArray[Any] | None = None
    zero_point: UInt8 | None = None
    bits: int = 0
    block: int = 0
    codebook: str | None = None

    def rows(self, start: int, stop: int) -> Operand:
        """Some of its rows."""
        part = slice(start, stop)
        return Operand(
            self.codes[part],
            None if self.scale is None else self.scale[part],
            None if self.zero_point is None else self.zero_point[part],
            self.bits,
            self.block,
            self.codebook,
        )


class File:
    """A parsed model: its nodes by name, and its stored tensors.

    Attributes:
        properties: what the model says of itself.

    Args:
        inputs: {input of the graph: its data type}; none where they all are float32.

    Raises:
        BadInput: two nodes share a name.
    """

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        stored: Mapping[str, npt.NDArray[Any]],
        properties: Mapping[str, str],
        inputs: Mapping[str, int] = {},
    ) -> None:
        self.properties, self._stored, self._inputs = properties, stored, inputs
        self.nodes = {node.name: node for node in nodes}
        self._makers = {output: node for node in nodes for output in node.output}
        if len(self.nodes) != len(nodes):
            raise _broken("nodes share a name")

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A stored tensor, by the name of a value: itself, or what is cast of it."""
        maker = self.maker(name)
        if name not in self._stored and maker is not None and maker.op_type == "Cast":
            name = input_of(maker, 0)
        if name not in self._stored:
            raise _broken(f"{name} is not made of a stored tensor")
        return self._stored[name]

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """Of the numbers that a run has to give under this name."""
        kind = self._inputs.get(name, onnx.TensorProto.FLOAT)
        if kind not in _DTYPES:
            raise _broken(f"{name} is no input of floats")
        return np.dtype(_DTYPES[kind])

    def node(self, name: str) -> onnx.NodeProto:
        if name not in self.nodes:
            raise _broken(f"{name} is missing")
        return self.nodes[name]

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that a value comes from."""
        return self._makers.get(value)

    def operand(self, name: str) -> Operand | None:
        """The matrix that the node `name` multiplies or looks up; None: there is no such node."""
        node = self.nodes.get(name)
        if node is None:
            return None
        at = 0 if node.op_type in _LOOKUPS else 1
        if node.op_type in _FLOAT:
            return Operand(self.tensor(input_of(node, at)))
        if node.op_type not in _QUANTIZED:
            raise _broken(f"{name} is {node.op_type}, which holds no matrix")
        inputs = [*node.input, "", "", "", ""]
        if node.op_type == "MatMulNBits" and inputs[4]:  # onnxruntime passes over zero points then
            raise _broken(f"{name} has g_idx")
        settings = {entry.name: entry.i for entry in node.attribute}
        codes, scale = self.tensor(inputs[at]), self.tensor(inputs[2])
        if node.op_type == _CODEBOOK:
            rows = settings.get("N", 0)
            if (
                settings.get("quant_type") not in _CODEBOOKS
                or rows < 1
                or codes.size % rows
                or scale.size % rows
            ):
                raise _broken(f"{name} is not of a known codebook")
            block = settings.get("block_size", 0)
            book = _CODEBOOKS[settings["quant_type"]]
            return Operand(codes.reshape(rows, -1), scale.reshape(rows, -1), None, 4, block, book)
        return Operand(
            codes.reshape(len(codes), -1),
            scale,
            self.tensor(inputs[3]) if inputs[3] else None,
            settings.get("bits", 4),
            settings.get("block_size", 0),
        )

    def bias(self, name: str) -> npt.NDArray[Any]:
        """What is added to the product `name`: by a node of its own, or by the product itself."""
        inputs = self.node(name).input
        if self.nodes[name].op_type == "MatMulNBits" and len(inputs) > _BIAS:
            return self.tensor(inputs[_BIAS])
        return self.tensor(input_of(self.node(f"{name}.bias"), 1))


def input_of(node: onnx.NodeProto, place: int) -> str:
    """The name of an input; BadInput where the node has none there."""
    if place >= len(node.input):
        raise _broken(f"{node.name} has {len(node.input)} inputs")
    return str(node.input[place])


def open_file(folder: Path) -> File:
    """The model and its data file in `folder`.

    Raises:
        BadInput: they cannot be read.
    """
    try:
        model = onnx.load_model(folder / MODEL, load_external_data=False)
        data = np.memmap(folder / DATA, np.uint8, "r")
    except (OSError, ValueError, DecodeError) as error:
        raise _broken(f"it cannot be read: {error}") from error
    if model.functions:
        raise _broken("functions hide nodes")
    stored = {
        tensor.name: _view(tensor, data)
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return File(model.graph.node, stored, properties, inputs)


def _view(tensor: onnx.TensorProto, data: UInt8) -> npt.NDArray[Any]:
    if tensor.data_type not in _DTYPES:
        raise _broken(f"{tensor.name} has data type {tensor.data_type}")
    dtype = np.dtype(_DTYPES[tensor.data_type])
    try:
        found = external_bytes(tensor, data, DATA, 8 * dtype.itemsize)
    except ValueError as error:
        raise _broken(str(error)) from error
    return found.view(dtype).reshape(tuple(tensor.dims))


def external_bytes(tensor: onnx.TensorProto, data: UInt8, location: str, bits: int) -> UInt8:
    """The bytes of a tensor in `data`, the file `location`, by what the tensor says of them.

    Args:
        bits: of one number.

    Raises:
        ValueError: it lies elsewhere, has no size, or ends beyond the file.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    try:
        start, length = int(place["offset"]), int(place["length"])
    except KeyError as error:
        raise ValueError(f"{tensor.name} has no {error}") from error
    if place.get("location") != location or min(shape, default=0) < 1:  # a number has no size
        raise ValueError(f"{tensor.name} of shape {shape} lies in {place.get('location')!r}")
    end = start + length
    if length != -(-math.prod(shape) * bits // 8) or not 0 <= start <= end <= len(data):
        raise ValueError(f"{tensor.name} ends at {end} of {len(data)} bytes")
    return data[start:end]


def read_back(
    file: File, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished files, under its source name and in source row order.

    Args:
        config: of the decoder that the files should hold.
        grids: {source name: grid name} of the quantized weights.

    Raises:
        BadInput: malformed, a weight missing, or on another grid or of another shape.
    """
    for weight in weights(config):
        yield weight.name, unpack(file, weight, config, grids.get(weight.name))


def unpack(
    file: File, weight: Weight, config: DecoderConfig, grid: str | None
) -> QuantizedTensor | Float32:
    """One weight: on its grid, or float32 where `grid` is None."""
    if not weight.is_matrix:
        return _vector(file, weight, config)
    operand = find(file, weight, config)
    if grid is None:
        if operand.scale is not None or operand.codes.shape != weight.shape:
            raise _broken(f"{weight.name} is no float matrix of shape {weight.shape}")
        return operand.codes.astype(np.float32)
    if grid not in GRIDS:
        raise _broken(f"{weight.name}: there is no grid {grid!r}")
    return _dequantizable(operand, weight, GRIDS[grid])


def find(file: File, weight: Weight, config: DecoderConfig) -> Operand:
    """Where the graph uses a matrix; a tied table must be one for lookup and product."""
    stem = weight.name.removesuffix(".weight")
    if weight.kind is Kind.EMBEDDING:
        looked_up = _needed(file.operand(f"{stem}.rows"), weight)
        if config.tied:
            multiplied = _needed(file.operand(stem), weight)
            if not _same(looked_up, multiplied):
                raise _broken(f"{weight.name} is another matrix as the head")
        return looked_up
    found = file.operand(stem)
    if found is not None:
        return found
    root, _, module = stem.rpartition(".")
    joined = _needed(file.operand(f"{root}.qkv_proj"), weight)
    start, stop = _place_of(module, config)
    return joined.rows(start, stop)


def _place_of(module: str, config: DecoderConfig) -> tuple[int, int]:
    """Which rows of q, k and v together one of them has."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    places = {
        "q_proj": (0, query),
        "k_proj": (query, query + key),
        "v_proj": (query + key, query + 2 * key),
    }
    if module not in places:
        raise _broken(f"{module} is missing")
    return places[module]


def _vector(file: File, weight: Weight, config: DecoderConfig) -> Float32:
    """A norm or a bias, the input of its node."""
    module = weight.name.rpartition(".")[0]
    if weight.is_norm:
        node = file.node(module)
        name = input_of(node, 2 if node.op_type == _ADD_AND_NORM else 1)
        if config.family.norm_offset:  # onnxruntime adds it when it loads the model
            raised = file.maker(name)
            if raised is None or raised.op_type != "Add":
                raise _broken(f"{module} has no offset")
            name = input_of(raised, 0)
        found = file.tensor(name)
    elif weight.kind is Kind.SCORE:
        found = file.tensor(input_of(file.node(module), 1))
    elif module in file.nodes:
        found = file.bias(module)
    else:
        root, _, last = module.rpartition(".")
        found = file.bias(f"{root}.qkv_proj")[slice(*_place_of(last, config))]
    if found.shape != weight.shape or found.dtype != np.float32:
        raise _broken(f"{weight.name} is {found.dtype} {found.shape}, not float32 {weight.shape}")
    return np.array(found)


def _dequantizable(operand: Operand, weight: Weight, grid: Grid) -> QuantizedTensor:
    """Codes and scales of a quantized matrix."""
    rows, columns = weight.shape
    blocks = -(-columns // operand.block) if operand.block >= 16 else 0
    scale, bits = operand.scale, operand.bits
    if (
        scale is None
        or bits != grid.bits
        or scale.shape != (rows, blocks)
        or operand.codes.shape != (rows, blocks * operand.block * bits // 8)
        or (grid.group is not None and operand.block != grid.group)
        or operand.codebook != (grid.name if grid.levels else None)
    ):
        raise _broken(f"{weight.name} is not on the grid {grid.name}")
    stored = _numbers(operand.codes, bits)
    if operand.codebook:
        stored = stored.reshape(rows, -1, 2)[:, :, ::-1].reshape(rows, -1)
    if operand.zero_point is None:
        stored -= np.uint8(1 << (bits - 1))  # wraps round, as the difference of two uint8 does
    else:
        if operand.zero_point.shape != (rows, -(-blocks * bits // 8)):
            raise _broken(f"{weight.name} has zero points {operand.zero_point.shape}")
        zero = _numbers(operand.zero_point, bits)[:, :blocks]
        stored.reshape(rows, blocks, operand.block)[...] -= zero[:, :, None]
    codes = np.ascontiguousarray(stored.view(np.int8)[:, :columns])
    found = scale.astype(np.float32)
    if grid.group is None:
        if (found != found[:, :1]).any():
            raise _broken(f"{weight.name}: the blocks of a row have different scales")
        found = np.ascontiguousarray(found[:, :1])
    return QuantizedTensor(grid, codes, found)


def _numbers(packed: UInt8, bits: int) -> UInt8:
    """Numbers of `bits` bits, low bits first: uint8 (rows, bytes) to (rows, bytes * 8 / bits)."""
    if bits == 8:
        return np.array(packed)
    each = 8 // bits
    found = np.empty((*packed.shape, each), np.uint8)
    for place in range(each):
        np.right_shift(packed, np.uint8(bits * place), out=found[:, :, place])
    found &= np.uint8((1 << bits) - 1)
    return found.reshape(len(packed), -1)


def _same(first: Operand, second: Operand) -> bool:
    """Whether both are views of the same bytes, read in the same way."""

    def places(operand: Operand) -> list[object]:
        arrays = (operand.codes, operand.scale, operand.zero_point)
        return [None if a is None else a.__array_interface__["data"] for a in arrays]

    alike = (first.bits, first.block) == (second.bits, second.block)
    return alike and places(first) == places(second)


def _needed(operand: Operand | None, weight: Weight) -> Operand:
    if operand is None:
        raise _broken(f"{weight.name} is missing")
    return operand


def _broken(why: str) -> BadInput:
    return BadInput(f"{MODEL} is not the model that it should be", why, "export it again")
