"""A small vocabulary for ExecuTorch programs: methods that call kernels and delegates in a row.

A .pte file is a flatbuffer (program.fbs) with a header inside, and segments of data behind it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .. import flatbuffer
from ..layout import Stored, padded
from . import schema
from .subgraph import Dtype, Shape, Tensor

_TYPES: dict[Dtype, tuple[int, int]] = {  # number in scalar_type.fbs, bytes
    "uint8": (0, 1),
    "int8": (1, 1),
    "int64": (4, 8),
    "float16": (5, 2),
    "float32": (6, 4),
}
_DTYPES: dict[str, Dtype] = {"|u1": "uint8", "|i1": "int8", "<f2": "float16", "<f4": "float32"}
_DYNAMIC_BOUND, _SEGMENT, _ARENA, _EXTERNAL = 1, 1, 1, 1
_HEADER, _DATA_HEADER = struct.Struct("<4sIQQQ"), struct.Struct("<4sIQQQQ")
_HEADER_ROOM, _DATA_ROOM = 32, 48  # multiples of what a flatbuffer is aligned to
_VERSION = 0
LARGEST = 2**63 - 1  # "to the end", of a slice


@dataclass(frozen=True, slots=True)
class Number:
    """An integer or a truth that a kernel computes."""

    index: int


class Graph(Protocol):
    """What a backend computes for a method, float32 tensors all of it.

    Attributes:
        BACKEND: as it is registered in ExecuTorch.
        given: the tensors that a run is given, in their order.
    """

    BACKEND: str
    given: list[Tensor]

    @property
    def results(self) -> list[Shape]:
        """Shapes of the outputs, in their order."""

    def serialize(self) -> bytes:
        """What the backend is handed."""


@dataclass
class _Planned:
    """A tensor in the arena: its bytes, and the first and last instruction that touches it."""

    entry: flatbuffer.Values
    nbytes: int
    first: float
    last: float

    def meets(self, other: _Planned) -> bool:
        """Whether both are needed at some time."""
        return self.first <= other.last and other.first <= self.last


class Method:
    """One entry point of a program; it grows in the order in which it runs.

    Args:
        tokens: of the longest run, or of the longest of its parts.
        constants: {stored tensor: its place in the constant segment, or its key in a .ptd file}.

    Attributes:
        graphs: what the delegates are handed, in their order.
    """

    def __init__(self, name: str, tokens: int, constants: Mapping[str, int | str]) -> None:
        self.name, self.tokens, self.graphs = name, tokens, list[bytes]()
        self._constants = constants
        self._values: list[flatbuffer.Values] = []
        self._scalars: dict[tuple[str, Any], int] = {}
        self._operators: list[tuple[str, str]] = []
        self._instructions: list[flatbuffer.Values] = []
        self._backends: list[str] = []
        self._planned: dict[int, _Planned] = {}
        self._held: dict[str, Tensor] = {}
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def input(self, dtype: Dtype, shape: Shape, longest: int | None = None) -> Tensor:
        """What a run is given; `longest`: of how many tokens, if not `tokens`."""
        tensor = self._tensor(dtype, shape, {}, longest)
        self._inputs.append(tensor.index)
        return tensor

    def constant(self, stored: Stored) -> Tensor:
        """A tensor of the file, or of the one beside it."""
        if stored.name not in self._held:
            place, fields = self._constants[stored.name], dict[str, Any]()
            if isinstance(place, int):
                fields["data_buffer_idx"] = place
            else:
                outside = {"fully_qualified_name": place, "location": _EXTERNAL}
                fields["extra_tensor_info"] = outside
            dtype = _DTYPES[stored.dtype]
            self._held[stored.name] = self._tensor(dtype, stored.shape, fields)
        return self._held[stored.name]

    def buffer(self, dtype: Dtype, shape: Shape) -> Tensor:
        """Memory that keeps what it holds from run to run; at first it holds anything."""
        kept = self._in_arena(dtype, shape)
        self._planned[kept.index].first, self._planned[kept.index].last = -1, math.inf
        return kept

    def number(self) -> Number:
        """For an integer that a kernel returns."""
        self._values.append(_value("Int", int_val=0))
        return Number(len(self._values) - 1)

    def truth(self) -> Number:
        """For what a comparison returns."""
        self._values.append(_value("Bool", bool_val=False))
        return Number(len(self._values) - 1)

    def output(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._outputs.append(tensor.index)
            self._planned[tensor.index].last = math.inf

    def call(self, operator: str, *args: Any, out: Tensor | Number) -> None:
        """Call `namespace::name.overload` with these arguments; kernels return what they fill."""
        name, _, overload = operator.partition(".")
        if (name, overload) not in self._operators:
            self._operators.append((name, overload))
        places = [self._place(arg) for arg in args]
        if isinstance(out, Tensor):
            places.append(self._place(out))
        places.append(self._place(out))
        index = self._operators.index((name, overload))
        self._add("KernelCall", {"op_index": index, "args": places})

    def made(self, operator: str, *args: Any, dtype: Dtype = "float32", shape: Shape) -> Tensor:
        """What an operator makes, in the arena."""
        made = self._in_arena(dtype, shape)
        self.call(operator, *args, out=made)
        return made

    def move(self, source: Number | int, target: Number) -> None:
        """Let `target` be what `source` is now."""
        places = {"move_from": self._place(source), "move_to": target.index}
        self._add("MoveCall", places)

    def here(self) -> int:
        """The next instruction, to jump back to.

        What is made between there and the jump may not be used before it is made again.
        """
        return len(self._instructions)

    def jump_unless(self, condition: Number, instruction: int) -> None:
        places = {
            "cond_value_index": condition.index,
            "destination_instruction": instruction,
        }
        self._add("JumpFalseCall", places)

    def delegate(self, graph: Graph) -> list[Tensor]:
        """The outputs of a graph that its backend runs."""
        made = [self._in_arena("float32", shape) for shape in graph.results]
        places = [self._place(tensor) for tensor in (*graph.given, *made)]
        self._add("DelegateCall", {"delegate_index": len(self.graphs), "args": places})
        self.graphs.append(graph.serialize())
        self._backends.append(graph.BACKEND)
        return made

    def plan(self, segments: Sequence[int]) -> flatbuffer.Values:
        """The method's table; `segments` are those of its graphs."""
        return _execution_plan(
            self.name,
            self._values,
            self._inputs,
            self._outputs,
            self._instructions,
            [{"name": name, "overload": overload} for name, overload in self._operators],
            [
                {
                    "id": backend,
                    "processed": {"location": _SEGMENT, "index": segment},
                    "compile_specs": [],
                }
                for backend, segment in zip(self._backends, segments, strict=True)
            ],
            _arrange(list(self._planned.values())),
        )

    def _tensor(
        self, dtype: Dtype, shape: Shape, fields: dict[str, Any], longest: int | None = None
    ) -> Tensor:
        tokens = longest or self.tokens
        sizes = [size if size >= 0 else -size * tokens for size in shape]
        dynamism = _DYNAMIC_BOUND if min(shape, default=0) < 0 else 0
        entry = _value(
            "Tensor",
            scalar_type=_TYPES[dtype][0],
            sizes=sizes,
            dim_order=list(range(len(shape))),
            shape_dynamism=dynamism,
            **fields,
        )
        self._values.append(entry)
        return Tensor(len(self._values) - 1, dtype, shape)

    def _in_arena(self, dtype: Dtype, shape: Shape) -> Tensor:
        """A tensor that the next instruction fills."""
        made, now = self._tensor(dtype, shape, {}), len(self._instructions)
        entry = self._values[made.index]["val"][1]
        nbytes = math.prod(entry["sizes"]) * _TYPES[dtype][1]
        self._planned[made.index] = _Planned(entry, nbytes, now, now)
        return made

    def _add(self, kind: str, fields: dict[str, Any]) -> None:
        self._instructions.append({"instr_args": (kind, fields)})

    def _place(self, argument: Any) -> int:
        """The index of an argument among the values; a tensor lives until it is used last."""
        if isinstance(argument, Tensor):
            if argument.index in self._planned:
                planned = self._planned[argument.index]
                planned.last = max(planned.last, len(self._instructions))
            return argument.index
        if isinstance(argument, Number):
            return argument.index
        kind, fields = _scalar(argument)
        if (kind, argument) not in self._scalars:
            self._values.append(_value(kind, **fields))
            self._scalars[kind, argument] = len(self._values) - 1
        return self._scalars[kind, argument]


def constant_method(name: str, *numbers: int | bool) -> flatbuffer.Values:
    """A method that returns these numbers, such as what a runner asks a model for."""
    scalars = (_scalar(number) for number in numbers)
    values = [_value(kind, **fields) for kind, fields in scalars]
    return _execution_plan(name, values, [], list(range(len(numbers))), [], [], [], 0)


@dataclass(frozen=True, slots=True)
class Data:
    """What lies behind the flatbuffer: first the graphs, then the tensors of the file.

    Attributes:
        tensors: all of them, and parts of them under names of their own; their offsets are counted
            from the first.
        nbytes: of all of them, each filled up to the alignment.
        constants: those that methods read, which lie first.
        keys: {tensor: key} of those that a backend reads, and of all others that are weights.
    """

    tensors: Sequence[Stored]
    nbytes: int
    constants: Sequence[Stored]
    keys: Mapping[str, str]


def serialize(methods: Sequence[Method], plans: list[flatbuffer.Values], data: Data) -> bytes:
    """The file up to its tensors.

    Args:
        plans: further methods, which call nothing.
    """
    graphs = list(dict.fromkeys(graph for method in methods for graph in method.graphs))
    place = 0
    segments: list[flatbuffer.Values] = []
    for graph in graphs:
        segments.append({"offset": place, "size": len(graph)})
        place = padded(place + len(graph))
    segment_of = {graph: index for index, graph in enumerate(graphs)}
    constants = {
        "segment_index": len(segments),
        "offsets": [0, *(tensor.offset for tensor in data.constants)],
    }
    size = max((tensor.offset + tensor.nbytes for tensor in data.constants), default=0)
    segments.append({"offset": place, "size": size})
    named = []
    for tensor in data.tensors:
        if tensor.name in data.keys:
            named.append({"key": data.keys[tensor.name], "segment_index": len(segments)})
            segments.append({"offset": place + tensor.offset, "size": tensor.nbytes})
    program = {
        "version": _VERSION,
        "execution_plan": [
            *(method.plan([segment_of[graph] for graph in method.graphs]) for method in methods),
            *plans,
        ],
        # ExecuTorch's Python tools expect all of these, also where they are empty.
        "constant_buffer": [],
        "backend_delegate_data": [],
        "segments": segments,
        "constant_segment": constants,
        "mutable_data_segments": [],
        "named_data": named,
    }
    filled = [graph.ljust(padded(len(graph)), b"\0") for graph in graphs]
    return b"".join([framed(program, place + data.nbytes), *filled])


def framed(program: flatbuffer.Values, nbytes: int) -> bytes:
    """The flatbuffer with its header; segments of `nbytes` in all follow, counted from its end."""
    content = flatbuffer.encode(schema.PROGRAM, program)
    size = len(content) + _HEADER_ROOM
    base = padded(size)
    header = _HEADER.pack(b"eh00", _HEADER.size, size, base, nbytes)
    return _with_room(content, header.ljust(_HEADER_ROOM, b"\0")).ljust(base, b"\0")


def data_head(data: Data) -> bytes:
    """A .ptd file up to its tensors: every one under its key, constants with their shapes."""
    named: list[flatbuffer.Values] = []
    for index, tensor in enumerate(data.tensors):
        entry: flatbuffer.Values = {"key": data.keys[tensor.name], "segment_index": index}
        if tensor in data.constants:
            entry["tensor_layout"] = {
                "scalar_type": _TYPES[_DTYPES[tensor.dtype]][0],
                "sizes": list(tensor.shape),
                "dim_order": list(range(len(tensor.shape))),
            }
        named.append(entry)
    segments = [{"offset": tensor.offset, "size": tensor.nbytes} for tensor in data.tensors]
    table = {"version": _VERSION, "segments": segments, "named_data": named}
    content = flatbuffer.encode(schema.DATA, table)
    base = padded(len(content) + _DATA_ROOM)
    sizes = (_DATA_ROOM, len(content), base, data.nbytes)
    header = _DATA_HEADER.pack(b"FH01", _DATA_HEADER.size, *sizes)
    return _with_room(content, header.ljust(_DATA_ROOM, b"\0")).ljust(base, b"\0")


def _with_room(content: bytes, header: bytes) -> bytes:
    """A flatbuffer with a header behind its identifier; its root moves on."""
    root = int.from_bytes(content[:4], "little") + len(header)
    return root.to_bytes(4, "little") + content[4:8] + header + content[8:]


def _execution_plan(
    name: str,
    values: list[flatbuffer.Values],
    inputs: list[int],
    outputs: list[int],
    instructions: list[flatbuffer.Values],
    operators: list[flatbuffer.Values],
    delegates: list[flatbuffer.Values],
    arena: int,
) -> flatbuffer.Values:
    return {
        "name": name,
        "container_meta_type": {"encoded_inp_str": "", "encoded_out_str": ""},
        "values": values,
        "inputs": inputs,
        "outputs": outputs,
        "chains": [{"inputs": [], "outputs": [], "instructions": instructions}],
        "operators": operators,
        "delegates": delegates,
        # The first is not used: it once was that of constants.
        "non_const_buffer_sizes": [0, arena] if arena else [0],
    }


def _arrange(planned: list[_Planned]) -> int:
    """Give tensors places in the arena, none of them over one that lives with it; its bytes.

    The largest first, each as low as it fits.
    """
    placed: list[tuple[int, int, _Planned]] = []
    for tensor in sorted(planned, key=lambda each: -each.nbytes):
        start = 0
        for begin, end, other in placed:
            if tensor.meets(other) and begin < start + tensor.nbytes and start < end:
                start = end
        low, high = start & 0xFFFFFFFF, start >> 32
        tensor.entry["allocation_info"] = {
            "memory_id": _ARENA,
            "memory_offset_low": low,
            "memory_offset_high": high,
        }
        placed.append((start, padded(start + tensor.nbytes), tensor))
        placed.sort(key=lambda each: each[:2])
    return max((end for _, end, _ in placed), default=0)


def _value(kind: str, **fields: Any) -> flatbuffer.Values:
    return {"val": (kind, fields)}


def _scalar(argument: int | float | bool | None) -> tuple[str, dict[str, Any]]:
    if argument is None:
        return "Null", {}
    if isinstance(argument, bool):
        return "Bool", {"bool_val": argument}
    if isinstance(argument, int):
        return "Int", {"int_val": argument}
    return "Double", {"double_val": argument}
