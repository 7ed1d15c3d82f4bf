"""A .pte file and the .ptd file beside it, opened: what the operators of a method are given.

Part of the reader, which shares no code with what writes the files: tables are parsed by classes
that flatbuffers' compiler makes of ExecuTorch's schemas. Every length is checked against the file
before it is used.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from .products import FEW, MANY, MOST, Graph, Product, elements, member, read_graph, text
from .tools import DATA, PROGRAM, generated

UInt8 = npt.NDArray[np.uint8]
_HEADER, _DATA_HEADER = struct.Struct("<4sIQQQ"), struct.Struct("<4sIQQQQ")
_HEADER_PLACE = 8  # behind the root's offset and the identifier
_SEGMENT, _EXTERNAL = 1, 1  # a DataLocation, a TensorDataLocation
_NO_VALUE = 0  # of a data_buffer_idx: the tensor is no constant
_BEYOND = (
    *(struct.error, LookupError, OverflowError, TypeError, ValueError, AttributeError, OSError),
)
_SCALARS = {0: "|u1", 1: "|i1", 5: "<f2", 6: "<f4"}  # of scalar_type.fbs
_LOOKUPS = {  # operator: dtype of the table, bits of a code
    "quantized_decomposed::embedding_byte": ("|i1", 8),
    "quantized_decomposed::embedding_4bit": ("|u1", 4),
    "quantized_decomposed::embedding_2bit": ("|u1", 2),
    "aten::embedding": ("<f2", 16),
}


_TABLE = re.compile(r"rope\.\d+\.(cos|sin)|number\..+|offset\.\d+|positions")  # what is no weight


class Place(NamedTuple):
    """Bytes of a file."""

    file: str
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of a file that a method is given."""

    dtype: str
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Vector:
    """A constant that a graph adds or multiplies by (`kind`), under its key."""

    key: str
    kind: str
    constant: Constant


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the kernel of the embedding is given.

    Attributes:
        scale: None: the table is float16.
        zero: zero points beside codes of 2 bits.
    """

    bits: int
    table: Constant
    scale: Constant | None
    zero: Constant | None


class Shared:
    """The tensors of a .ptd file.

    Attributes:
        name: of the file.
        data: the whole file.
        keys: where each tensor lies.
        constants: those that methods may be given, by their keys.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.data = path.name, np.memmap(path, np.uint8, "r")
        header = _DATA_HEADER.unpack_from(self.data.data, _HEADER_PLACE)
        magic, length, start, size, base, behind = header
        whole = start + size <= base and base + behind == len(self.data)
        if (magic, length) != (b"FH01", _DATA_HEADER.size) or not whole:
            raise ValueError(f"{path.name} has no header, or another size than it says")
        content = self.data[: start + size].data
        schema = generated(DATA)
        if not schema.FlatTensor.FlatTensorBufferHasIdentifier(content, 0):
            raise ValueError(f"{path.name} has no tensors of ExecuTorch")
        table = schema.FlatTensor.GetRootAs(content, 0)
        segments = _segments(table, self.name, base, len(self.data))
        self.keys: dict[str, Place] = {}
        self.constants: dict[str, Constant] = {}
        for each in elements(table, "NamedData", MANY):
            key, place = _named(each, self.keys, segments)
            if (layout := each.TensorLayout()) is not None:
                dtype, shape = _scalar(layout)
                if math.prod(shape) * np.dtype(dtype).itemsize != place.nbytes:
                    raise ValueError(f"{key} has not {place.nbytes} bytes")
                self.constants[key] = Constant(dtype, shape, place)


class Program:
    """The tables of a .pte file, and what they say of its segments.

    Args:
        shared: where tensors lie that are not in the file.

    Attributes:
        name: of the file.
        data: the whole file.
        own: where that lies in the file what has a name.
        keys: the same, in either file.
    """

    def __init__(self, path: Path, shared: Shared | None = None) -> None:
        self.name, self._shared = path.name, shared
        self.data = data = np.memmap(path, np.uint8, "r")
        magic, length, size, base, behind = _HEADER.unpack_from(data.data, _HEADER_PLACE)
        if (magic, length) != (b"eh00", _HEADER.size) or not size <= base <= len(data):
            raise ValueError("it has no header")
        if base + behind != len(data):
            raise ValueError(f"it ends at {len(data)} and not at {base + behind}")
        content = data[:size].data  # flatbuffers compares slices
        self._schema = generated(PROGRAM)
        if not self._schema.Program.ProgramBufferHasIdentifier(content, 0):
            raise ValueError("it is no program of ExecuTorch")
        self._program = self._schema.Program.GetRootAs(content, 0)
        self._segments = _segments(self._program, self.name, base, len(data))
        self.own: dict[str, Place] = {}
        for each in elements(self._program, "NamedData", MANY):
            _named(each, self.own, self._segments)
        outside = shared.keys if shared else {}
        if twice := self.own.keys() & outside.keys():
            raise ValueError(f"{min(twice)} lies in both files")
        self.keys: Mapping[str, Place] = {**self.own, **outside}
        self._key_at = {place: key for key, place in self.keys.items()}
        self._sizes = {key: place.nbytes for key, place in self.keys.items()}
        self._graphs: dict[int, Graph] = {}
        self._spent = 0

    def plan(self, name: str) -> Any:
        """The table of a method."""
        plans = [
            plan
            for plan in elements(self._program, "ExecutionPlan", FEW)
            if text(plan.Name()) == name
        ]
        if len(plans) != 1 or plans[0].ChainsLength() != 1:
            raise ValueError(f"there is no one {name}, or it runs in several chains")
        return plans[0]

    def calls(self, plan: Any) -> Iterator[tuple[str, Any]]:
        """The instructions of a method: their kinds and tables."""
        for each in elements(plan.Chains(0), "Instructions", MANY):
            given = each.InstrArgsType(), each.InstrArgs()
            yield member(self._schema, "InstructionArguments", *given)

    def uses(self, name: str) -> tuple[list[Product | Vector], Lookup]:
        """What a method of XNNPACK's graphs computes with, in the order in which it runs."""
        plan = self.plan(name)
        uses: list[Product | Vector] = []
        lookups: list[Lookup] = []
        for kind, call in self.calls(plan):
            if kind == "DelegateCall":
                uses += self._delegated(plan, call)
            elif kind == "KernelCall":
                lookups += self.lookup(plan, call, plan.Inputs(0))
            else:
                raise ValueError(f"{name} has a {kind}")
        if len(lookups) != 1:
            raise ValueError(f"{name} looks up {len(lookups)} embeddings")
        return uses, lookups[0]

    def segment_of(self, plan: Any, call: Any, backend: str) -> int:
        """Where that lies which the backend of a call is handed."""
        delegate = plan.Delegates(call.DelegateIndex())
        processed = delegate.Processed()
        if text(delegate.Id()) != backend or processed.Location() != _SEGMENT:
            raise ValueError(f"a delegate is not {backend}'s, or brings its graph along")
        index: int = processed.Index()
        return index

    def segment(self, index: int) -> memoryview:
        place = self._segments[index]
        return self.data[place.start : place.stop].data

    def _delegated(self, plan: Any, call: Any) -> Iterator[Product | Vector]:
        graph = self._graph(self.segment_of(plan, call, "XnnpackBackend"))
        self._spend(1 + len(graph.uses))
        if call.ArgsLength() != graph.inputs + graph.outputs:
            raise ValueError(f"a graph is called with {call.ArgsLength()} tensors")
        for use in graph.uses:
            if isinstance(use, Product):
                yield use
                continue
            kind, tensor = self.argument(plan, call.Args(use.place))
            if kind != "Tensor":
                raise ValueError(f"a graph is given a {kind}")
            if tensor.DataBufferIdx() == _NO_VALUE and tensor.ExtraTensorInfo() is None:
                continue
            constant = self._constant(tensor)
            key = self._key_at.get(constant.place)
            if key is not None and not is_table(key):
                yield Vector(key, use.kind, constant)

    def lookup(self, plan: Any, call: Any, tokens: int) -> Iterator[Lookup]:
        """What a call looks up, if it is one that does; `tokens`: the value that has their ids."""
        operator = plan.Operators(call.OpIndex())
        name = text(operator.Name())
        self._spend(1)
        if name not in _LOOKUPS:
            return
        dtype, bits = _LOOKUPS[name]
        args = [self.argument(plan, index) for index in elements(call, "Args", FEW)]
        table = self._float_or_codes(args[0], dtype)
        scale = zero = None
        at = 1
        if bits != 16:
            scale, at = self._float_or_codes(args[1], "<f4"), 5
            if bits == 2:
                zero = self._float_or_codes(args[2], "<f4")
            ends = [each.IntVal() for _, each in args[3:5]]
            plain = zero is not None or args[2][0] == "Null"
            if not plain or ends != [-(1 << (bits - 1)), (1 << (bits - 1)) - 1]:
                raise ValueError(f"{name} is given zero points, or other ends than {ends}")
        if call.Args(at) != tokens or text(operator.Overload()) != "out":
            raise ValueError(f"{name} does not look up the tokens")
        yield Lookup(bits, table, scale, zero)

    def _float_or_codes(self, argument: tuple[str, Any], dtype: str) -> Constant:
        kind, tensor = argument
        found = self._constant(tensor) if kind == "Tensor" else None
        if found is None or found.dtype != dtype or len(found.shape) != 2:
            raise ValueError(f"an embedding is looked up in a {kind}, not in {dtype}")
        return found

    def argument(self, plan: Any, index: int) -> tuple[str, Any]:
        """The kind and the table of a value."""
        if not 0 <= index < plan.ValuesLength():
            raise ValueError(f"there is no value {index}")
        value = plan.Values(index)
        return member(self._schema, "KernelTypes", value.ValType(), value.Val())

    def _constant(self, tensor: Any) -> Constant:
        """A tensor within the constants of the file, or within the file beside it."""
        dtype, shape = _scalar(tensor)
        outside = tensor.ExtraTensorInfo()
        inside = tensor.DataBufferIdx() != _NO_VALUE
        if (
            tensor.StorageOffset()
            or tensor.ShapeDynamism()
            or tensor.AllocationInfo() is not None
            or inside == (outside is not None)
        ):
            raise ValueError(f"a tensor of shape {shape} is no constant of the file")
        if outside is not None:
            return self._shared_constant(outside, dtype, shape)
        constants = self._program.ConstantSegment()
        segment = self._segments[constants.SegmentIndex()]
        if tensor.DataBufferIdx() >= constants.OffsetsLength():
            raise ValueError(f"there is no constant {tensor.DataBufferIdx()}")
        start = segment.start + constants.Offsets(tensor.DataBufferIdx())
        place = Place(self.name, start, math.prod(shape) * np.dtype(dtype).itemsize)
        return Constant(dtype, shape, _within(place, segment.start, segment.stop))

    def _shared_constant(self, outside: Any, dtype: str, shape: tuple[int, ...]) -> Constant:
        key = text(outside.FullyQualifiedName())
        found = self._shared.constants.get(key) if self._shared else None
        if outside.Location() != _EXTERNAL or found is None:
            raise ValueError(f"{key} is no constant of a file beside it")
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(f"{key} is {found.dtype} {found.shape}, not {dtype} {shape}")
        return found

    def _graph(self, index: int) -> Graph:
        if index not in self._graphs:
            self._graphs[index] = read_graph(self.segment(index), self._sizes, self._spend)
        return self._graphs[index]

    def _spend(self, steps: int) -> None:
        """ValueError where graphs, which may be the same ones again and again, take too long."""
        self._spent += steps
        if self._spent > MOST:
            raise ValueError("its graphs are too large")


def is_table(key: str) -> bool:
    """Whether a key is that of a table or number, and not of a weight."""
    return _TABLE.fullmatch(key) is not None


def _within(place: Place, start: int, stop: int) -> Place:
    if not start <= place.start <= place.stop <= stop:
        raise ValueError(f"{place.nbytes} bytes from {place.start} on are not in {start} to {stop}")
    return place


def _segments(table: Any, name: str, base: int, size: int) -> list[Place]:
    """Those of a file of `size` bytes whose data begins at `base`."""
    return [
        _within(Place(name, base + each.Offset(), each.Size()), base, size)
        for each in elements(table, "Segments", MANY)
    ]


def _named(entry: Any, known: dict[str, Place], segments: list[Place]) -> tuple[str, Place]:
    """The key and place of named data, which are added to `known`."""
    key = text(entry.Key())
    if key in known:
        raise ValueError(f"{key} stands twice")
    known[key] = segments[entry.SegmentIndex()]
    return key, known[key]


def _scalar(tensor: Any) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a table that has them, its dimensions in their order."""
    dtype = _SCALARS.get(tensor.ScalarType(), "")
    shape = tuple(elements(tensor, "Sizes", FEW))
    order = list(elements(tensor, "DimOrder", FEW))
    if not dtype or min(shape, default=0) < 1 or order != [*range(len(shape))]:
        raise ValueError(f"a tensor of shape {shape} is of no kind that is read")
    return dtype, shape


@contextmanager
def malformed(name: str) -> Iterator[None]:
    """What the generated classes raise at offsets that lead nowhere, as BadInput."""
    try:
        yield
    except _BEYOND as error:
        raise broken(f"it cannot be read: {error}", name) from error


def broken(why: str, name: str = "model.pte") -> BadInput:
    return BadInput(f"{name} is not the program that it should be", why, "export it again")
