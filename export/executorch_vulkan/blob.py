"""The graph of a .pte file as the Vulkan backend reads it, with the checks that it does not make.

Part of the reader, which shares no code with what writes the file. The backend aborts at an
operator that it does not know, reads beyond a constant that is too short, lets tensors overwrite
one another where it is told so, and takes what it finds in the place of any argument.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..executorch.products import FEW, MANY, elements, member, text
from ..executorch.tools import VULKAN, generated

_HEADER = struct.Struct("<4x4sHIIIQ")
_NAMED = 2**64 - 1
_PLAIN = 0  # a storage, and a memory layout: a buffer that goes along rows
_BYTES = {"uint8": 1, "int8": 1, "float32": 4}
_DATATYPES = {1: "uint8", 2: "int8", 5: "float32"}
_UNSET, _FLOAT32 = 127, 5
# {operator: what it is given, and what it fills}: a tensor, a constant, either, a constant or
# nothing, nothing, an integer, a number, the position of a run, integers, several tensors.
_TENSOR, _CONSTANT, _EITHER, _OPTIONAL, _NOTHING = "tceo-"
_INTEGER, _NUMBER, _POSITION, _SIZES, _TENSORS = "idpsl"
_OPERATORS = {
    "et_vk.prepack.default": ("c", "t"),
    "et_vk.rms_norm.default": ("tcd", "t"),
    "et_vk.linear_q4gsw.default": ("tccio", "t"),
    "et_vk.linear_q8csw.default": ("tcco", "t"),
    "aten.linear.default": ("tco", "t"),
    "aten.cat.default": ("li", "t"),
    "aten.view_copy.default": ("ts", "t"),
    "aten.slice_copy.Tensor": ("tiiii", "t"),
    "aten.add.Tensor": ("tei", "t"),
    "aten.mul.Tensor": ("te", "t"),
    "aten.sigmoid.default": ("t", "t"),
    "aten.tanh.default": ("t", "t"),
    "et_vk.apply_rotary_emb_hf.default": ("ttttp", "l"),
    "update_cache.default": ("ttp-", ""),
    "llama.custom_sdpa.default": ("tttp----", "t"),
}

_KEPT = ("et_vk.prepack.default", "update_cache.default")  # fill what stays from run to run


class Tensor(NamedTuple):
    """A value of the graph; `key`: of what it holds, None: it is no constant."""

    id: int
    dtype: str
    shape: tuple[int, ...]
    key: str | None
    memory: int


class Position(NamedTuple):
    """The integer that a run is given."""

    id: int


Value = Tensor | Position | tuple[int, ...] | int | float | None


class Call(NamedTuple):
    """An operator, and what it is given, its outputs last; several tensors are a list."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """What the backend computes: operators in the order in which they run."""

    calls: tuple[Call, ...]
    given: Tensor
    made: Tensor


def read_graph(payload: memoryview, sizes: Mapping[str, int]) -> Graph:
    """The graph that the backend is handed.

    Args:
        sizes: {key: bytes} of what the file holds under names.

    Raises:
        ValueError, or what the generated classes raise: it is malformed, or no graph that is known
            to run: another operator or argument, a constant of another size, memory that is used
            twice at a time.
    """
    table = _table(payload)
    keys = [_key(each, sizes) for each in elements(table, "Constants", MANY)]
    schema = generated(VULKAN)
    raw = [
        member(schema, "GraphTypes", each.ValueType(), each.Value())
        for each in elements(table, "Values", MANY)
    ]
    values = [_value(id, kind, found, keys, sizes) for id, (kind, found) in enumerate(raw)]
    calls = tuple(_call(each, raw, values) for each in elements(table, "Chain", MANY))
    inputs = [values[id] for id in elements(table, "InputIds", FEW)]
    outputs = [values[id] for id in elements(table, "OutputIds", FEW)]
    given, position, made = (*inputs, *outputs)
    if not (isinstance(given, Tensor) and isinstance(made, Tensor)) or given.key or made.key:
        raise ValueError("the graph is given no tensor, or makes none")
    if not isinstance(position, Position) or len(inputs) != 2:
        raise ValueError("the graph is not given a position")
    for id in (given.id, made.id):
        if raw[id][1].StagingDatatype() != _FLOAT32:
            raise ValueError("the graph is not given float32 numbers, or makes none")
    _require_memory(calls, given, made)
    return Graph(calls, given, made)


def _table(payload: memoryview) -> Any:
    magic, length, start, size, behind, nbytes = _HEADER.unpack_from(payload)
    content = payload[start : start + size]
    if (magic, length) != (b"VH00", _HEADER.size) or len(content) != size:
        raise ValueError("a delegate has no header of the Vulkan backend, or ends too early")
    if nbytes or not start + size <= behind <= len(payload):
        raise ValueError("a delegate has constants inside, or ends too early")
    graph = generated(VULKAN).VkGraph
    if not graph.VkGraphBufferHasIdentifier(content, 0):
        raise ValueError("a delegate is no graph of the Vulkan backend")
    return graph.GetRootAs(content, 0)


def _key(constant: Any, sizes: Mapping[str, int]) -> str:
    key = text(constant.NamedKey())
    if constant.Offset() != _NAMED or constant.Length() != sizes.get(key):
        raise ValueError(f"the file has no {constant.Length()} bytes under the key {key}")
    return key


def _value(id: int, kind: str, found: Any, keys: list[str], sizes: Mapping[str, int]) -> Value:
    if kind == "VkTensor":
        return _tensor(id, found, keys, sizes)
    if kind == "SymInt":
        return Position(id)
    if kind == "Int":
        return int(found.IntVal())
    if kind == "Double":
        return float(found.DoubleVal())
    if kind == "IntList":
        return tuple(elements(found, "Items", FEW))
    if kind in ("Null", "ValueList"):
        return None
    raise ValueError(f"the graph has a {kind}")


def _tensor(id: int, found: Any, keys: list[str], sizes: Mapping[str, int]) -> Tensor:
    dtype = _DATATYPES.get(found.Datatype(), "")
    shape = tuple(elements(found, "Dims", FEW))
    plain = found.StorageType() == found.MemoryLayout() == _PLAIN
    if not dtype or not plain or min(shape, default=0) < 1:
        raise ValueError(f"value {id} of shape {shape} is in no buffer that is read")
    constant, memory = found.ConstantId(), found.MemObjId()
    if constant < 0:
        if dtype != "float32":
            raise ValueError(f"value {id} is {dtype}")
        return Tensor(id, dtype, shape, None, memory)
    key, nbytes = keys[constant], math.prod(shape) * _BYTES[dtype]
    if sizes[key] != nbytes or memory >= 0:
        raise ValueError(f"{key} has not {nbytes} bytes, or shares memory")
    return Tensor(id, dtype, shape, key, memory)


def _call(call: Any, raw: list[tuple[str, Any]], values: list[Value]) -> Call:
    name = text(call.Name())
    if name not in _OPERATORS:
        raise ValueError(f"the graph has the operator {name}")
    ids = list(elements(call, "Args", FEW))
    wanted = "".join(_OPERATORS[name])
    if len(ids) != len(wanted):
        raise ValueError(f"{name} is given {len(ids)} arguments")
    return Call(
        name, tuple(_given(name, *pair, raw, values) for pair in zip(wanted, ids, strict=True))
    )


def _given(name: str, wanted: str, id: int, raw: list[tuple[str, Any]], values: list[Value]) -> Any:
    if not 0 <= id < len(values):
        raise ValueError(f"{name} is given value {id}, which there is not")
    (kind, table), found = raw[id], values[id]
    if wanted == _TENSORS and kind == "ValueList":
        return [_given(name, _TENSOR, each, raw, values) for each in elements(table, "Items", FEW)]
    constant = isinstance(found, Tensor) and found.key is not None
    tensor = isinstance(found, Tensor) and not constant
    fits = {
        _TENSOR: tensor,
        _CONSTANT: constant,
        _EITHER: isinstance(found, Tensor),
        _OPTIONAL: constant or kind == "Null",
        _NOTHING: kind == "Null",
        _INTEGER: kind == "Int",
        _NUMBER: kind == "Double",
        _POSITION: kind == "SymInt",
        _SIZES: kind == "IntList",
    }
    if not fits.get(wanted, False):
        raise ValueError(f"{name} is given a {kind} in the place of another argument")
    return found


def _require_memory(calls: tuple[Call, ...], given: Tensor, made: Tensor) -> None:
    """ValueError where a tensor is read before it is filled, or after another took its place."""
    memory = _Memory()
    memory.fill(given, [])
    for call in calls:
        wanted = len(_OPERATORS[call.name][0])
        read, filled = (list(_tensors(part)) for part in (call.args[:wanted], call.args[wanted:]))
        if call.name == "update_cache.default":
            filled = [read.pop(1)]
        memory.read(call.name, read)
        for tensor in filled:
            if call.name in _KEPT and tensor.memory >= 0:
                raise ValueError(f"value {tensor.id} shares memory, and is kept from run to run")
            memory.fill(tensor, read)
            read.append(tensor)
    memory.read("the end", [made])


class _Memory:
    """Which tensor stands in each allocation."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._filled: set[int] = set()

    def read(self, reader: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            here = tensor.memory < 0 or self._holders.get(tensor.memory) == tensor.id
            if tensor.id not in self._filled or not here:
                raise ValueError(f"{reader} reads value {tensor.id}, which is not there")

    def fill(self, tensor: Tensor, beside: list[Tensor]) -> None:
        """With what is made of, or together with, the tensors `beside`."""
        if tensor.id in self._filled:
            raise ValueError(f"value {tensor.id} is filled twice")
        if tensor.memory >= 0:
            if any(tensor.memory == each.memory for each in beside):
                raise ValueError(f"value {tensor.id} is written over what it is made of")
            self._holders[tensor.memory] = tensor.id
        self._filled.add(tensor.id)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for each in args:
        for one in each if isinstance(each, list) else (each,):
            if isinstance(one, Tensor) and one.key is None:
                yield one
