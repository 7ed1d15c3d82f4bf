"""An independent reader: the QDQ graphs and tables back to codes, scales and source names.

Shares no code with layout.py, static.py, packing.py or tables.py, and reads what the operators of
the graphs are given, not what their tensors are called. Every length is checked against the files
before it is used: a hostile file is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...checkpoint import read_json
from ...errors import BadInput
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor
from ..onnx.reader import external_bytes

FOLDER, DATA, TABLES, DESCRIPTION = "qdq", "model.data", "tables.data", "qnn.json"
GRAPHS = ("decode", "prefill")
UInt8 = npt.NDArray[np.uint8]
_BITS: dict[int, int] = {
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT: 32,
}
_INSIDE: dict[int, str] = {onnx.TensorProto.UINT16: "<u2", onnx.TensorProto.FLOAT: "<f4"}


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix as DequantizeLinear reads it: `codes` are bytes of the data file.

    Attributes:
        codes: int4 or int8 (columns, rows), packed without gaps.
        scale: float32 (rows,), or (columns / block, rows).
        shape: (columns, rows).
        bits: of a code.
        block: inputs that share a scale; 0: a scale for each output.
    """

    codes: UInt8
    scale: Float32
    shape: tuple[int, int]
    bits: int
    block: int

    def same(self, other: Operand) -> bool:
        """Whether both are the same bytes of the file, read in the same way."""

        def place(operand: Operand) -> list[object]:
            arrays = (operand.codes, operand.scale)
            return [array.__array_interface__["data"] for array in arrays]

        settings = (self.shape, self.bits, self.block)
        return settings == (other.shape, other.bits, other.block) and place(self) == place(other)


@dataclass(frozen=True, slots=True)
class Vector:
    """A norm or a bias on its encoding; `values` are exact to half a `step`."""

    values: Float32
    step: float


class Graph:
    """One parsed graph over the bytes of the data file."""

    def __init__(self, path: Path, data: UInt8) -> None:
        self.name, self._data = path.name, data
        try:
            model = onnx.load_model(path, load_external_data=False)
        except (OSError, ValueError, DecodeError) as error:
            raise _broken(self.name, f"it cannot be read: {error}") from error
        self.nodes: dict[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
        self._makers: dict[str, onnx.NodeProto] = {
            output: node for node in model.graph.node for output in node.output
        }
        self._tensors: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in model.graph.initializer
        }
        if len(self.nodes) != len(model.graph.node) or model.functions:
            raise _broken(self.name, "nodes share a name, or functions hide them")

    def operand(self, name: str) -> Operand:
        """The matrix that the node `name` multiplies."""
        maker = self._weight(name, "MatMul")
        settings = {entry.name: entry.i for entry in maker.attribute}
        if len(maker.input) != 2:  # a zero point would be added to every code
            raise _broken(self.name, f"the weight of {name} has a zero point")
        codes, scale = (self._tensor(given) for given in maker.input)
        bits, block = _BITS.get(codes.data_type, 0), settings.get("block_size", 0)
        wanted = {"axis": 0, "block_size": block} if block else {"axis": 1}
        if (
            bits not in (4, 8)
            or scale.data_type != onnx.TensorProto.FLOAT
            or len(codes.dims) != 2
            or settings != wanted
            or block < 0
        ):
            raise _broken(self.name, f"the weight of {name} is not read as codes and scales")
        columns, rows = codes.dims
        return Operand(
            self._bytes(codes),
            self._bytes(scale).view("<f4").reshape(tuple(scale.dims)),
            (columns, rows),
            bits,
            block,
        )

    def vector(self, name: str, kind: str) -> Vector:
        """The encoded constant that the node `name` reads beside its input."""
        maker = self._weight(name, kind)
        if len(maker.input) != 3 or maker.attribute:
            raise _broken(self.name, f"{name} has no encoding of its own")
        codes, scale, zero = (self._inside(self._tensor(given)) for given in maker.input)
        if codes.dtype != np.uint16 or scale.size != 1 or zero.size != 1:
            raise _broken(self.name, f"{name} is not encoded in 16 bits")
        step = float(scale.reshape(-1)[0])
        values = codes.astype(np.float32) - np.float32(zero.reshape(-1)[0])
        return Vector(values * np.float32(step), step)

    def _weight(self, name: str, kind: str) -> onnx.NodeProto:
        """The DequantizeLinear behind the second input of a node."""
        node = self.nodes.get(name)
        if node is None or node.op_type != kind or len(node.input) != 2:
            raise _broken(self.name, f"{name} is no {kind} of two inputs")
        maker = self._makers.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear":
            raise _broken(self.name, f"the weight of {name} is not dequantized")
        return maker

    def _tensor(self, name: str) -> onnx.TensorProto:
        if name not in self._tensors:
            raise _broken(self.name, f"{name} is not stored")
        return self._tensors[name]

    def _inside(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """A constant in the model file."""
        dtype, shape = _INSIDE.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None or len(tensor.raw_data) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise _broken(self.name, f"{tensor.name} of shape {shape} is no small constant")
        return np.frombuffer(tensor.raw_data, dtype).reshape(shape)

    def _bytes(self, tensor: onnx.TensorProto) -> UInt8:
        """A tensor of the data file."""
        try:
            return external_bytes(tensor, self._data, DATA, _BITS.get(tensor.data_type, 0))
        except ValueError as error:
            raise _broken(self.name, str(error)) from error


class Files:
    """Both graphs over one data file, and the tables beside the context binaries."""

    def __init__(self, folder: Path) -> None:
        data = _mapped(folder / FOLDER / DATA)
        self.graphs = [Graph(folder / FOLDER / f"{name}.onnx", data) for name in GRAPHS]
        self._tables = _mapped(folder / TABLES)
        self._description = read_json(folder / DESCRIPTION)

    def operand(self, name: str) -> Operand:
        """A matrix, the same bytes in both graphs."""
        first, second = (graph.operand(name) for graph in self.graphs)
        if not first.same(second):
            raise _broken(FOLDER, f"{name} is another matrix in {GRAPHS[1]} than in {GRAPHS[0]}")
        return first

    def vector(self, name: str, kind: str) -> Vector:
        """A norm or a bias, equal in both graphs."""
        first, second = (graph.vector(name, kind) for graph in self.graphs)
        if first.step != second.step or not np.array_equal(first.values, second.values):
            raise _broken(FOLDER, f"{name} differs in {GRAPHS[1]} and {GRAPHS[0]}")
        return first

    def table(self, name: str, dtype: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
        """An array of tables.data, as qnn.json places it."""
        try:
            entry = self._description["tables"][name]
            stated = (entry["dtype"], tuple(entry["shape"]))
            start = int(entry["offset"])
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(DESCRIPTION, f"{name}: {type(error).__name__} {error}") from error
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        if stated != (dtype, shape) or not 0 <= start <= end <= len(self._tables):
            raise _broken(DESCRIPTION, f"{name} is {stated} at {start}, not {(dtype, shape)}")
        return self._tables[start:end].view(dtype).reshape(shape)


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, QuantizedTensor | Float32]]:
    """Every weight of the finished files, under its source name and in source row order.

    Raises:
        BadInput: malformed, a weight missing, or on another grid or of another shape.
    """
    files = Files(folder)
    for weight in weights(config):
        if weight.is_matrix:
            yield weight.name, matrix(files, weight, config, grids.get(weight.name))
        else:
            yield weight.name, vector(files, weight, config).values


def vector(files: Files, weight: Weight, config: DecoderConfig) -> Vector:
    """A norm or a bias."""
    module = weight.name.rpartition(".")[0]
    if weight.is_norm:
        found = files.vector(module, "RMSNormalization")
        if config.family.norm_offset:
            found = Vector(found.values - np.float32(config.family.norm_offset), found.step)
    else:
        found = files.vector(f"{module}.bias", "Add")
    if found.values.shape != weight.shape:
        raise _broken(FOLDER, f"{weight.name} has shape {found.values.shape}, not {weight.shape}")
    return found


def matrix(
    files: Files, weight: Weight, config: DecoderConfig, grid: str | None
) -> QuantizedTensor:
    """A matrix on its grid; both copies of a tied table must be equal."""
    if grid is None or grid not in GRIDS:
        raise _broken(FOLDER, f"{weight.name}: the NPU holds no grid {grid!r}")
    stem = weight.name.removesuffix(".weight")
    if weight.kind is not Kind.EMBEDDING:
        return multiplied(files.operand(stem), weight, GRIDS[grid])
    found = _looked_up(files, weight, GRIDS[grid])
    if config.tied:
        head = multiplied(files.operand(stem), weight, GRIDS[grid])
        if not (
            np.array_equal(head.codes, found.codes) and np.array_equal(head.scale, found.scale)
        ):
            raise _broken(TABLES, f"{weight.name} is another matrix as the head")
    return found


def multiplied(operand: Operand, weight: Weight, grid: Grid) -> QuantizedTensor:
    """Codes and scales of a matrix, in source row order."""
    rows, columns = weight.shape
    shape = (rows,) if grid.group is None else (columns // grid.group, rows)
    if (
        operand.shape != (columns, rows)
        or operand.bits != grid.bits
        or operand.block != (grid.group or 0)
        or operand.scale.shape != shape
    ):
        raise _broken(FOLDER, f"{weight.name} is not on the grid {grid.name}")
    codes = _numbers(operand.codes, operand.bits, rows * columns).reshape(columns, rows)
    scale = operand.scale.reshape(-1, rows)
    return QuantizedTensor(grid, np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T))


def _looked_up(files: Files, weight: Weight, grid: Grid) -> QuantizedTensor:
    rows, columns = weight.shape
    groups = 1 if grid.group is None else columns // grid.group
    dtype = "|u1" if grid.bits == 4 else "|i1"
    stored = files.table("embedding.codes", dtype, (rows, columns * grid.bits // 8))
    scale = files.table("embedding.scale", "<f4", (rows, groups))
    codes = _numbers(stored.reshape(-1).view(np.uint8), grid.bits, rows * columns)
    return QuantizedTensor(grid, codes.reshape(rows, columns), np.array(scale))


def _numbers(packed: UInt8, bits: int, count: int) -> npt.NDArray[np.int8]:
    """Signed numbers of 4 or 8 bits, low bits first."""
    if bits == 8:
        return np.array(packed.view(np.int8))
    found = np.empty((packed.size, 2), np.int8)
    signed = packed.view(np.int8)
    found[:, 0] = (signed << 4) >> 4
    found[:, 1] = signed >> 4
    return found.reshape(-1)[:count]


def _mapped(path: Path) -> UInt8:
    try:
        found: UInt8 = np.memmap(path, np.uint8, "r")
        return found
    except (OSError, ValueError) as error:
        raise _broken(path.name, f"it cannot be read: {error}") from error


def _broken(name: str, why: str) -> BadInput:
    return BadInput(f"{name} is not what it should be", why, "export it again")
