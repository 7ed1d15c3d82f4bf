"""A small vocabulary for what ExecuTorch's Vulkan backend computes: one graph, handed as a whole.

Every tensor is float32 in a buffer, but for the constants. Shapes are tuples of sizes, with TOKENS
for the number of tokens of a run. The backend is told which tensors share memory, and believes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import flatbuffer
from ..executorch.subgraph import Shape, Tensor, with_header
from ..layout import Stored
from . import schema

_FLOAT32 = 5  # of VkDataType
_DATATYPES = {"|u1": 1, "|i1": 2, "<f4": _FLOAT32}
_UNSET = 127  # no datatype: there is no staging buffer
_BUFFER, _ROWS = 0, 0  # storage, and a layout that goes along rows
_OWN = -1  # in the place of shared memory
_NO_CONSTANT = -1
_NAMED = 2**64 - 1  # an offset, where a constant has a name instead


class Value(NamedTuple):
    """A tensor of the graph, or a constant."""

    id: int
    shape: Shape


class Number(NamedTuple):
    """An integer that a run is given."""

    id: int


Argument = Value | Number | Sequence[Any] | int | float | bool | None


class Graph:
    """A graph that grows in the order in which it runs.

    Args:
        tokens: of the longest run.
        keys: {stored tensor: its key in the .pte file}.

    Attributes:
        given: the tensors of its inputs, in their order.
    """

    BACKEND = "VulkanBackend"

    def __init__(self, tokens: int, keys: Mapping[str, str]) -> None:
        self._tokens, self._keys = tokens, keys
        self.given: list[Tensor] = []
        self._values: list[flatbuffer.Values] = []
        self._calls: list[flatbuffer.Values] = []
        self._constants: dict[str, flatbuffer.Values] = {}
        self._held: dict[tuple[str, Shape], Value] = {}
        self._scalars: dict[tuple[type, Any], int] = {}
        self._inputs: list[int] = []
        self._outputs: list[Value] = []
        self._lives: dict[int, list[int]] = {}  # of tensors that share memory

    @property
    def results(self) -> list[Shape]:
        """Shapes of the outputs, in their order."""
        return [value.shape for value in self._outputs]

    def input(self, tensor: Tensor) -> Value:
        """A float32 tensor that a run is given."""
        found = self._tensor(tensor.shape, {"staging_datatype": _FLOAT32})
        self._lives[found.id] = [-1, -1]
        self._given(tensor, found.id)
        return found

    def number(self, tensor: Tensor) -> Number:
        """The first element of an integer tensor that a run is given."""
        found = Number(self._value("SymInt", value=0))
        self._given(tensor, found.id)
        return found

    def output(self, *values: Value) -> None:
        """End with these values; called once."""
        self._outputs = list(values)
        for value in values:
            self._values[value.id]["value"][1]["staging_datatype"] = _FLOAT32
            self._lives[value.id][1] = len(self._calls)

    def constant(self, stored: Stored, *shape: int) -> Value:
        """A tensor of the file, which operators copy to the GPU once; as `shape`, if given."""
        dims = shape or stored.shape
        if (stored.name, dims) not in self._held:
            key = self._keys[stored.name]
            entry = {"offset": _NAMED, "length": stored.nbytes, "named_key": key}
            self._constants.setdefault(key, entry)
            fields = {
                "datatype": _DATATYPES[stored.dtype],
                "constant_id": list(self._constants).index(key),
            }
            self._held[stored.name, dims] = self._tensor(dims, fields)
        return self._held[stored.name, dims]

    def kept(self, *shape: int) -> Value:
        """Memory that keeps what it holds from run to run; at first it holds anything."""
        return self._tensor(shape, {})

    def op(self, operator: str, *args: Argument, shape: Shape) -> Value:
        """What an operator makes."""
        (made,) = self.ops(operator, *args, shapes=[shape], listed=False)
        return made

    def ops(
        self, operator: str, *args: Argument, shapes: Sequence[Shape], listed: bool = True
    ) -> list[Value]:
        """As `op`, of one that makes several tensors, which it is given as a list."""
        made = [self._tensor(shape, {}) for shape in shapes]
        for value in made:
            self._lives[value.id] = [len(self._calls)] * 2
        self.call(operator, *args, made if listed else made[0])
        return made

    def call(self, operator: str, *args: Argument) -> None:
        """Run an operator that fills some of its arguments."""
        places = [self._place(arg) for arg in args]
        number = len(self._calls)
        self._calls.append({"node_id": number, "name": operator, "args": places})

    def serialize(self) -> bytes:
        """What the backend is handed: a header and the graph."""
        self._share()
        graph = {
            "version": "0",
            "chain": self._calls,
            "values": self._values,
            "input_ids": self._inputs,
            "output_ids": [value.id for value in self._outputs],
            "constants": list(self._constants.values()),
            "shaders": [],
        }
        return with_header(flatbuffer.encode(schema.VULKAN, graph), b"", schema.MAGIC)

    def _share(self) -> None:
        """Give tensors places in as few allocations as it takes, no two at once in one."""
        ends: list[int] = []
        for id, (first, last) in sorted(self._lives.items(), key=lambda each: each[1]):
            place = next((n for n, end in enumerate(ends) if end < first), len(ends))
            ends[place : place + 1] = [last]
            self._values[id]["value"][1]["mem_obj_id"] = place

    def _given(self, tensor: Tensor, id: int) -> None:
        self.given.append(tensor)
        self._inputs.append(id)

    def _tensor(self, shape: Shape, fields: dict[str, int]) -> Value:
        known = {
            "datatype": _FLOAT32,
            "dims": [size if size >= 0 else -size * self._tokens for size in shape],
            "constant_id": _NO_CONSTANT,
            "mem_obj_id": _OWN,
            "storage_type": _BUFFER,
            "memory_layout": _ROWS,
            "staging_datatype": _UNSET,
        }
        return Value(self._value("VkTensor", **known | fields), shape)

    def _value(self, kind: str, **fields: Any) -> int:
        self._values.append({"value": (kind, fields)})
        return len(self._values) - 1

    def _place(self, argument: Argument) -> int:
        """The id of an argument; a tensor lives until it is used last."""
        if isinstance(argument, Value):
            if argument.id in self._lives:
                self._lives[argument.id][1] = len(self._calls)
            return argument.id
        if isinstance(argument, Number):
            return argument.id
        if isinstance(argument, Sequence):
            if argument and isinstance(argument[0], Value):
                return self._value("ValueList", items=[self._place(each) for each in argument])
            return self._value("IntList", items=list(argument))
        known = (type(argument), argument)
        if known not in self._scalars:
            self._scalars[known] = self._scalar(argument)
        return self._scalars[known]

    def _scalar(self, number: int | float | bool | None) -> int:
        if number is None:
            return self._value("Null")
        if isinstance(number, bool):
            return self._value("Bool", bool_val=number)
        if isinstance(number, int):
            return self._value("Int", int_val=number)
        return self._value("Double", double_val=number)
