"""An independent reader: `model.pte` back to codes, scales and source names.

Shares no code with what writes the file: tables are parsed by classes that flatbuffers' compiler
makes of ExecuTorch's schemas. It reads what the operators of both methods are given, in the order
in which they run: a product has the weight that its place among them demands. Every length is
checked against the file before it is used: a hostile file is BadInput, never a crash or a large
allocation.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...architectures import EMBEDDING, DecoderConfig, Kind, Weight, weights
from ...errors import BadInput
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor
from .products import FEW, MANY, MOST, Graph, Product, elements, member, read_graph, text
from .tools import PROGRAM, generated

MODEL = "model.pte"
METHODS = ("forward", "all_logits")
UInt8 = npt.NDArray[np.uint8]
_HEADER = struct.Struct("<4sIQQQ")
_HEADER_PLACE = 8  # behind the root's offset and the identifier
_SEGMENT = 1  # a DataLocation
_NO_VALUE = 0  # of a data_buffer_idx: the tensor is no constant
_KEY = re.compile(r"(?P<stem>.+?)(\.lookup)?\.(?P<part>codes|scale|weight|bias):[0-9a-f]{16}")
_BEYOND = (
    *(struct.error, LookupError, OverflowError, TypeError, ValueError, AttributeError, OSError),
)
_SCALARS = {0: "|u1", 1: "|i1", 5: "<f2", 6: "<f4"}  # of scalar_type.fbs
_LOOKUPS = {  # operator: dtype of the table, bits of a code
    "quantized_decomposed::embedding_byte": ("|i1", 8),
    "quantized_decomposed::embedding_4bit": ("|u1", 4),
    "aten::embedding": ("<f2", 16),
}


class Place(NamedTuple):
    """Bytes of the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the file that a method is given."""

    dtype: str
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Vector:
    """A constant that a graph adds or multiplies by (`kind`), under a key of the file."""

    key: str
    kind: str
    constant: Constant


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the kernel of the embedding is given; no scale: the table is float16."""

    bits: int
    table: Constant
    scale: Constant | None


@dataclass(frozen=True, slots=True)
class File:
    """What the methods of a program compute with.

    Attributes:
        data: the whole file.
        keys: where that lies what has a name.
        uses: {source name: product or norm}; both methods have the same, in the same order.
        lookup: the embedding, for the kernel.
        stamps: {source name: the digits of its digest that are in its keys}.
    """

    data: UInt8
    keys: Mapping[str, Place]
    uses: Mapping[str, Product | Vector]
    lookup: Lookup
    stamps: Mapping[str, str]

    def array(self, place: Place, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of the file.

        Raises:
            BadInput: the array has another size than its place.
        """
        count = math.prod(shape)
        if place.nbytes != count * np.dtype(dtype).itemsize:
            raise _broken(f"{dtype} {shape} does not fill {place.nbytes} bytes at {place.start}")
        return np.frombuffer(self.data, dtype, count, place.start).reshape(shape)


def open_file(folder: Path, config: DecoderConfig) -> File:
    """`model.pte` in `folder`.

    Raises:
        BadInput: it cannot be read, or its methods compute with other weights than `config` has,
            or in another order.
        DependencyMissing: ExecuTorch is not installed.
    """
    with _malformed():
        data = np.memmap(folder / MODEL, np.uint8, "r")
        program = _Program(data)
        (uses, lookup), others = (program.uses(name) for name in METHODS)
        if (uses, lookup) != others:
            raise ValueError(f"{METHODS[1]} computes with other weights than {METHODS[0]}")
        named = {_names(use)[0]: use for use in uses}
        _require_order([name for use in uses for name in _names(use)], config)
        stamps: dict[str, str] = {}
        for key in program.keys:
            name, stamp = _source(key), key.rpartition(":")[2]
            if stamps.setdefault(name, stamp) != stamp:
                raise ValueError(f"{name} has two digests")
        return File(data, program.keys, named, lookup, stamps)


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, under its source name and in source row order.

    Args:
        config: of the decoder that the file should hold.
        grids: {source name: grid name} of the quantized weights.

    Raises:
        BadInput: malformed, a weight missing, or on another grid or of another shape.
        DependencyMissing: ExecuTorch is not installed.
    """
    file = open_file(folder, config)
    for weight in weights(config):
        yield weight.name, unpack(file, weight, config, grids.get(weight.name))


def unpack(
    file: File, weight: Weight, config: DecoderConfig, grid: str | None
) -> QuantizedTensor | Float32:
    """One weight: on its grid, or float32 where `grid` is None.

    A float embedding that is tied is the float32 copy, which the kernel has in float16.

    Raises:
        BadInput: as `read_back`; or a tied table is another one as the head.
    """
    if not weight.is_matrix:
        return _vector(file, weight, config)
    if grid is not None and grid not in GRIDS:
        raise _broken(f"{weight.name}: there is no grid {grid!r}")
    wanted = None if grid is None else GRIDS[grid]
    if weight.kind is not Kind.EMBEDDING:
        return _multiplied(file, weight, wanted)
    if not config.tied:
        return looked_up(file, weight, wanted)
    found = _multiplied(file, weight, wanted)
    if not _same_table(file, weight, wanted, found):
        raise _broken(f"{weight.name} is another matrix as the head")
    return found


def looked_up(file: File, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
    """The embedding as the kernel reads it; float16 becomes float32."""
    table, scale = _lookup_arrays(file, weight, grid)
    if grid is None or scale is None:
        return table.astype(np.float32)
    codes = np.array(table) if grid.bits == 8 else _nibbles(table, high_first=True)
    return _on_grid(weight, grid, codes, scale)


def _lookup_arrays(
    file: File, weight: Weight, grid: Grid | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Table and scales of the kernel, as they lie in the file."""
    found, (rows, columns) = file.lookup, weight.shape
    bits = 16 if grid is None else grid.bits
    width = columns // 2 if bits == 4 else columns
    if found.bits != bits or found.table.shape != (rows, width):
        raise _broken(f"{weight.name} is looked up in {found.bits} bits {found.table.shape}")
    table = file.array(found.table.place, found.table.dtype, found.table.shape)
    if grid is None or found.scale is None:
        return table, None
    shape = (rows, grid.groups(columns))
    if found.scale.shape != shape:
        raise _broken(f"{weight.name} has scales {found.scale.shape}, not {shape}")
    return table, file.array(found.scale.place, found.scale.dtype, shape)


def _same_table(
    file: File, weight: Weight, grid: Grid | None, head: QuantizedTensor | Float32
) -> bool:
    """Whether the kernel looks up what is multiplied by; the same bytes, where both have 8 bits."""
    if grid is not None and grid.bits == 8:
        _lookup_arrays(file, weight, grid)
        lookup, product = file.lookup, file.uses[weight.name]
        assert isinstance(product, Product) and product.scale and lookup.scale
        places = file.keys[product.weight], file.keys[product.scale]
        return places == (lookup.table.place, lookup.scale.place)
    table = looked_up(file, weight, grid)
    if isinstance(table, QuantizedTensor):
        assert isinstance(head, QuantizedTensor), "both are on the grid"
        return np.array_equal(table.codes, head.codes) and np.array_equal(table.scale, head.scale)
    with np.errstate(over="ignore"):
        return np.array_equal(table, np.asarray(head).astype("<f2").astype(np.float32))


def _multiplied(file: File, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
    """A matrix as XNNPACK multiplies by it."""
    product, (rows, columns) = file.uses[weight.name], weight.shape
    wanted = (32, None) if grid is None else (grid.bits, grid.group)
    if (
        not isinstance(product, Product)
        or product.shape != weight.shape
        or (product.bits, product.group) != wanted
    ):
        raise _broken(f"{weight.name} is no product of shape {weight.shape} on the grid {wanted}")
    place, bits = file.keys[product.weight], product.bits
    if grid is None or product.scale is None:
        return np.array(file.array(place, "<f4", (rows, columns)))
    if _source(product.scale) != weight.name:
        raise _broken(f"{weight.name} is given {product.scale}")
    shape = (rows, grid.groups(columns))
    if bits == 8:
        scale = file.array(file.keys[product.scale], "<f4", shape)
        return _on_grid(weight, grid, np.array(file.array(place, "|i1", (rows, columns))), scale)
    upper = file.array(file.keys[product.scale], "<u2", shape).astype("<u4")
    packed = file.array(place, "|u1", (rows, columns // 2))
    codes = _nibbles(packed, high_first=False)
    return _on_grid(weight, grid, codes, (upper << np.uint32(16)).view("<f4"))


def _on_grid(
    weight: Weight, grid: Grid, codes: npt.NDArray[np.int8], scale: npt.NDArray[Any]
) -> QuantizedTensor:
    """Codes and scales; a code of 4 bits is within any grid of 4 bits, one of 8 need not be."""
    if grid.levels is not None or codes.min() < grid.low or codes.max() > grid.high:
        raise _broken(f"{weight.name} has codes beyond the grid {grid.name}")
    if not ((scale > 0) & np.isfinite(scale)).all():
        raise _broken(f"{weight.name} has a scale that is not above 0, or not finite")
    return QuantizedTensor(grid, codes, np.array(scale, np.float32))


def _vector(file: File, weight: Weight, config: DecoderConfig) -> Float32:
    """A norm, or the bias of a product."""
    if weight.is_norm:
        use = file.uses[weight.name]
        kind = "XNNAdd" if config.family.norm_offset else "XNNMultiply"
        if not isinstance(use, Vector) or use.kind != kind:
            raise _broken(f"{weight.name} is no norm that an {kind} is given")
        shape, place = use.constant.shape, use.constant.place
        if use.constant.dtype != "<f4":
            raise _broken(f"{weight.name} is {use.constant.dtype}")
    else:
        product = file.uses[f"{weight.name.removesuffix('.bias')}.weight"]
        key = product.bias if isinstance(product, Product) else None
        if key is None or _source(key) != weight.name:
            raise _broken(f"{weight.name} is not added to its product")
        shape, place = weight.shape, file.keys[key]
    if shape != weight.shape:
        raise _broken(f"{weight.name} has shape {shape}, not {weight.shape}")
    return np.array(file.array(place, "<f4", shape))


def _names(use: Product | Vector) -> list[str]:
    """The source names of a product's weight and bias, or of a norm."""
    if isinstance(use, Vector):
        return [_source(use.key)]
    return [_source(key) for key in (use.weight, use.bias) if key is not None]


def _require_order(names: Sequence[str], config: DecoderConfig) -> None:
    """ValueError unless these are the weights of a decoder, each once, as one runs them."""
    wanted = [weight.name for weight in weights(config) if weight.kind is not Kind.EMBEDDING]
    if config.tied:
        wanted.append(EMBEDDING)
    for found, expected in zip_longest(names, wanted, fillvalue="nothing"):
        if found != expected:
            raise ValueError(f"{METHODS[0]} computes with {found} in the place of {expected}")


def _source(key: str) -> str:
    """The source name of a weight, of the key of any of its tensors."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key} is not the key of a weight")
    return f"{found['stem']}.{'bias' if found['part'] == 'bias' else 'weight'}"


def _nibbles(packed: UInt8, high_first: bool) -> npt.NDArray[np.int8]:
    """Numbers of 4 bits that were raised by 8: (rows, bytes) to int8 (rows, 2 * bytes)."""
    found = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=found[:, :, int(high_first)])
    np.right_shift(packed, np.uint8(4), out=found[:, :, int(not high_first)])
    found -= np.uint8(8)  # wraps round
    return found.view(np.int8).reshape(len(packed), -1)


class _Program:
    """The tables of the file, and what they say of its segments.

    Attributes:
        keys: where that lies what has a name.
    """

    def __init__(self, data: UInt8) -> None:
        magic, length, size, base, behind = _HEADER.unpack_from(data.data, _HEADER_PLACE)
        if (magic, length) != (b"eh00", _HEADER.size) or not size <= base <= len(data):
            raise ValueError("it has no header")
        if base + behind != len(data):
            raise ValueError(f"it ends at {len(data)} and not at {base + behind}")
        content = data[:size].data  # flatbuffers compares slices
        self._schema, self._data = generated(PROGRAM), data
        if not self._schema.Program.ProgramBufferHasIdentifier(content, 0):
            raise ValueError("it is no program of ExecuTorch")
        self._program = self._schema.Program.GetRootAs(content, 0)
        self._segments = [
            _within(Place(base + each.Offset(), each.Size()), base, len(data))
            for each in elements(self._program, "Segments", MANY)
        ]
        self.keys: dict[str, Place] = {}
        for each in elements(self._program, "NamedData", MANY):
            key = text(each.Key())
            if key in self.keys:
                raise ValueError(f"{key} stands twice")
            self.keys[key] = self._segments[each.SegmentIndex()]
        self._key_at = {place: key for key, place in self.keys.items()}
        self._sizes = {key: place.nbytes for key, place in self.keys.items()}
        self._graphs: dict[int, Graph] = {}
        self._spent = 0

    def uses(self, name: str) -> tuple[list[Product | Vector], Lookup]:
        """What a method computes with, in the order in which it runs."""
        plans = [
            plan
            for plan in elements(self._program, "ExecutionPlan", FEW)
            if text(plan.Name()) == name
        ]
        if len(plans) != 1 or plans[0].ChainsLength() != 1:
            raise ValueError(f"there is no one {name}, or it runs in several chains")
        uses: list[Product | Vector] = []
        lookups: list[Lookup] = []
        for each in elements(plans[0].Chains(0), "Instructions", MANY):
            given = each.InstrArgsType(), each.InstrArgs()
            kind, call = member(self._schema, "InstructionArguments", *given)
            if kind == "DelegateCall":
                uses += self._delegated(plans[0], call)
            elif kind == "KernelCall":
                lookups += self._looked_up(plans[0], call)
            else:
                raise ValueError(f"{name} has a {kind}")
        if len(lookups) != 1:
            raise ValueError(f"{name} looks up {len(lookups)} embeddings")
        return uses, lookups[0]

    def _delegated(self, plan: Any, call: Any) -> Iterator[Product | Vector]:
        delegate = plan.Delegates(call.DelegateIndex())
        processed = delegate.Processed()
        if text(delegate.Id()) != "XnnpackBackend" or processed.Location() != _SEGMENT:
            raise ValueError("a delegate is not XNNPACK's, or brings its graph along")
        graph = self._graph(processed.Index())
        self._spend(1 + len(graph.uses))
        if call.ArgsLength() != graph.inputs + graph.outputs:
            raise ValueError(f"a graph is called with {call.ArgsLength()} tensors")
        for use in graph.uses:
            if isinstance(use, Product):
                yield use
                continue
            kind, tensor = self._argument(plan, call.Args(use.place))
            if kind != "Tensor":
                raise ValueError(f"a graph is given a {kind}")
            if tensor.DataBufferIdx() == _NO_VALUE:
                continue
            constant = self._constant(tensor)
            if constant.place in self._key_at:
                yield Vector(self._key_at[constant.place], use.kind, constant)

    def _looked_up(self, plan: Any, call: Any) -> Iterator[Lookup]:
        """What a call looks up, if it is one that does."""
        operator = plan.Operators(call.OpIndex())
        name = text(operator.Name())
        self._spend(1)
        if name not in _LOOKUPS:
            return
        dtype, bits = _LOOKUPS[name]
        args = [self._argument(plan, index) for index in elements(call, "Args", FEW)]
        table = self._float_or_codes(args[0], dtype)
        if bits == 16:
            scale, at = None, 1
        else:
            scale, at = self._float_or_codes(args[1], "<f4"), 5
            ends = [each.IntVal() for _, each in args[3:5]]
            if args[2][0] != "Null" or ends != [-(1 << (bits - 1)), (1 << (bits - 1)) - 1]:
                raise ValueError(f"{name} is given zero points, or other ends than {ends}")
        if call.Args(at) != plan.Inputs(0) or text(operator.Overload()) != "out":
            raise ValueError(f"{name} does not look up the tokens")
        yield Lookup(bits, table, scale)

    def _float_or_codes(self, argument: tuple[str, Any], dtype: str) -> Constant:
        kind, tensor = argument
        found = self._constant(tensor) if kind == "Tensor" else None
        if found is None or found.dtype != dtype or len(found.shape) != 2:
            raise ValueError(f"an embedding is looked up in a {kind}, not in {dtype}")
        return found

    def _argument(self, plan: Any, index: int) -> tuple[str, Any]:
        if not 0 <= index < plan.ValuesLength():
            raise ValueError(f"there is no value {index}")
        value = plan.Values(index)
        return member(self._schema, "KernelTypes", value.ValType(), value.Val())

    def _constant(self, tensor: Any) -> Constant:
        """A tensor within the constants of the file."""
        dtype = _SCALARS.get(tensor.ScalarType(), "")
        shape = tuple(elements(tensor, "Sizes", FEW))
        order = list(elements(tensor, "DimOrder", FEW))
        if (
            not dtype
            or min(shape, default=0) < 1
            or order != [*range(len(shape))]
            or tensor.StorageOffset()
            or tensor.ShapeDynamism()
            or tensor.DataBufferIdx() == _NO_VALUE
            or tensor.AllocationInfo() is not None
            or tensor.ExtraTensorInfo() is not None
        ):
            raise ValueError(f"a tensor of shape {shape} is no constant of the file")
        constants = self._program.ConstantSegment()
        segment = self._segments[constants.SegmentIndex()]
        if tensor.DataBufferIdx() >= constants.OffsetsLength():
            raise ValueError(f"there is no constant {tensor.DataBufferIdx()}")
        start = segment.start + constants.Offsets(tensor.DataBufferIdx())
        place = Place(start, math.prod(shape) * np.dtype(dtype).itemsize)
        return Constant(dtype, shape, _within(place, segment.start, sum(segment)))

    def _graph(self, index: int) -> Graph:
        if index not in self._graphs:
            place = self._segments[index]
            graph = read_graph(self._data[place.start : sum(place)].data, self._sizes)
            self._spend(graph.size)
            self._graphs[index] = graph
        return self._graphs[index]

    def _spend(self, steps: int) -> None:
        """ValueError where graphs, which may be the same ones again and again, take too long."""
        self._spent += steps
        if self._spent > MOST:
            raise ValueError("its graphs are too large")


def _within(place: Place, start: int, stop: int) -> Place:
    if not start <= place.start <= sum(place) <= stop:
        raise ValueError(f"{place.nbytes} bytes from {place.start} on are not in {start} to {stop}")
    return place


@contextmanager
def _malformed() -> Iterator[None]:
    """What the generated classes raise at offsets that lead nowhere, as BadInput."""
    try:
        yield
    except _BEYOND as error:
        raise _broken(f"it cannot be read: {error}") from error


def _broken(why: str) -> BadInput:
    return BadInput(f"{MODEL} is not the program that it should be", why, "export it again")
