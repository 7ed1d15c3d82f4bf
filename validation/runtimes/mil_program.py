"""A function of an ML Program, made ready to run: its operations as calls, each with its arguments.

All that is looked up by name or read out of a message is looked up here, once. What cannot be run
is refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mil_lifetime import READ, UPDATE, WRITE, mark_last_reads, mark_scores, update_in_place
from .mil_operator import Operator
from .mil_ops import OPERATORS
from .mil_package import Package, Stored, Type, Value, malformed, names_of, refused, type_of
from .mil_step import FLOATS, HELD, Fetch, Function, Output, States, Step, refuse_vast
from .mil_weights import Looked, Meaning, Plain, Room, Scaled, Weight

_OPSETS = ("CoreML7", "CoreML8", "CoreML9")
_LAZY = 1 << 14  # bytes from which a float constant stays as it lies in the package
_ALIKE = {"x", "y", "a", "b", "values", "query", "key", "value", "update"}  # of one data type


class _Name(NamedTuple):
    """A value that a run computes."""

    slot: int
    type: Type


class _Constant(NamedTuple):
    """A value that the package states.

    Attributes:
        value: what operations read of it; None: nothing but weights are made of it.
        plain: as it lies there.
    """

    value: Tensor | Weight | None
    type: Type
    plain: Value | Meaning


_Bound = _Name | _Constant


def build(package: Package, name: str, states: States, room: int, half: bool) -> Function:
    """A function of a package.

    Args:
        states: its states are added to them.
        room: bytes for computed weights.
        half: weights that are FLOAT16 are rounded to it.

    Raises:
        ValidationFailed: there is no such function, or the interpreter cannot run it; the
            operation is named.
    """
    if name not in package.functions:
        raise malformed(f"it has no function {name}, only {names_of(package.functions)}")
    function = package.model.mlProgram.functions[name]
    if function.opset not in _OPSETS or function.opset not in function.block_specializations:
        raise malformed(f"its function {name} is of the operations {function.opset!r}")
    builder = _Builder(package, states, room, half)
    return builder.function(function.inputs, function.block_specializations[function.opset])


class _Builder:
    def __init__(self, package: Package, states: States, room: int, half: bool) -> None:
        self._package, self._states = package, states
        self._room, self._half = Room(room), half
        self._names: dict[str, _Bound] = {}
        self._inputs: dict[str, Type] = {}
        self._own: dict[str, Type] = {}  # states
        self._steps: list[Step] = []
        self._memory: list[str] = []  # of each slot: values of the same may share it
        self._written: dict[str, str] = {}  # {memory: the state that it became}

    def function(self, inputs: Any, block: Any) -> Function:
        for message in inputs:
            self._input(message)
        places = {name: len(self._memory) - len(self._inputs) + index
                  for index, name in enumerate(self._inputs)}  # fmt: skip
        for operation in block.operations:
            self._operation(operation)
        bounds = {name: self._bound(name, "the function") for name in block.outputs}
        outputs = {name: bound.type for name, bound in bounds.items()}
        results = {name: _fetched(bound, "tensor") for name, bound in bounds.items()}
        kept = {bound.slot for bound in bounds.values() if isinstance(bound, _Name)}
        mark_scores(self._steps, kept)
        mark_last_reads(self._steps, kept)
        memory = [self._written.get(each, each) for each in self._memory]
        update_in_place(self._steps, kept, memory)
        slots = len(self._memory)
        return Function(self._inputs, outputs, self._own, places, results, self._steps, slots)

    def _input(self, message: Any) -> None:
        given = message.type.WhichOneof("type")
        if given == "stateType":
            type = type_of(message.type.stateType.wrappedType.tensorType)
            self._refuse_known(message.name)
            self._states.add(message.name, type)
            self._own[message.name] = type
        elif given == "tensorType" and (type := type_of(message.type.tensorType)).kind in HELD:
            self._define(message.name, type, message.name)
            self._inputs[message.name] = type
        else:
            raise malformed(f"its input {message.name} is a {given} of another data type")

    def _operation(self, operation: Any) -> None:
        kind = str(operation.type)
        name = str(operation.outputs[0].name) if operation.outputs else "without an output"
        if kind == "const":
            self._constant(name, operation)
        elif kind.startswith("constexpr_"):
            self._weight(kind, name, operation)
        elif kind in (READ, WRITE, UPDATE):
            self._state(kind, name, operation)
        elif kind in OPERATORS:
            self._call(kind, name, operation, OPERATORS[kind])
        else:
            raise refused(kind, name, "no such operation is known here")

    def _constant(self, name: str, operation: Any) -> None:
        if len(operation.outputs) != 1 or "val" not in operation.attributes:
            raise refused("const", name, "it has no value")
        bound = self._stated(operation.attributes["val"])
        declared = operation.outputs[0].type
        if declared.WhichOneof("type") == "tensorType" and (
            (type := type_of(declared.tensorType)) != bound.type
        ):
            raise refused("const", name, f"it is {bound.type}, and is said to be {type}")
        self._add(name, bound)

    def _stated(self, message: Any) -> _Constant:
        """A value of the package, as operations read it."""
        value = self._package.value(message)
        if not isinstance(value, Stored):
            length = () if isinstance(value, str) else (len(value),)
            return _Constant(None, Type("STRING", length), value)
        type = Type(value.kind, value.shape)
        if value.kind in FLOATS and value.shape and value.content.size >= _LAZY:
            return _Constant(Weight(Plain(value), self._room, False), type, value)
        if value.kind not in HELD:
            return _Constant(None, type, value)
        held = torch.from_numpy(value.numbers().copy()).to(HELD[value.kind])
        return _Constant(held, type, value)

    def _weight(self, kind: str, name: str, operation: Any) -> None:
        keys = [*operation.inputs, *(key for key in operation.attributes if key != "name")]
        parts = {key: self._part(kind, name, operation, key) for key in keys}
        try:
            meaning = _meaning(kind, parts)
        except (LookupError, ValueError, AttributeError) as error:
            raise refused(kind, name, f"{error}") from error
        if parts or len(operation.outputs) != 1:
            raise refused(kind, name, f"its argument {names_of(parts)} is not known here")
        type = type_of(operation.outputs[0].type.tensorType)
        if type.shape != meaning.shape or type.kind not in (*FLOATS, "INT8", "UINT8"):
            raise refused(kind, name, f"it makes {meaning.shape}, and is said to make {type}")
        weight = Weight(meaning, self._room, self._half and type.kind == "FLOAT16")
        self._add(name, _Constant(weight if type.kind in FLOATS else None, type, meaning))

    def _part(self, kind: str, name: str, operation: Any, key: str) -> Any:
        """What a weight is made of: what lies in the package, or indices into a table."""
        if key in operation.attributes:
            return self._package.value(operation.attributes[key])
        bound = self._argument(kind, name, operation, key)
        plain = bound.plain if isinstance(bound, _Constant) else None
        if isinstance(plain, Stored | str) or (isinstance(plain, Looked) and key == "data"):
            return plain
        raise refused(kind, name, f"its {key} is not a constant as it lies in the package")

    def _state(self, kind: str, name: str, operation: Any) -> None:
        """What is read is the tensor itself: what writes makes another one, or see lifetime."""
        state, data = ("state", "value") if kind == UPDATE else ("input", "data")
        wanted = {state} if kind == READ else {state, data}
        if set(operation.inputs) != wanted or len(operation.outputs) != (kind != WRITE):
            raise refused(kind, name, f"it is given {names_of(operation.inputs)}")
        key = _name_of(operation.inputs[state])
        if key not in self._own:
            raise refused(kind, name, f"there is no state {key!r}")
        tensors, type = self._states.tensors, self._own[key]
        if kind == READ:
            step = Step(kind, name, lambda: tensors[key], state=key, moves=True)
            self._append(step, {}, operation, key)
            return

        def write(value: Tensor) -> Tensor:
            if value.shape != tensors[key].shape:
                raise ValueError(f"{tuple(value.shape)} is written to {tuple(tensors[key].shape)}")
            tensors[key] = value
            return value

        bound = self._argument(kind, name, operation, data)
        if bound.type.kind != type.kind:
            raise refused(kind, name, f"state {key} is {type}, and is given {bound.type}")
        own = isinstance(bound, _Name) and self._becomes(bound, key)
        function = write if own else lambda value: write(value.clone())
        step = Step(kind, f"{name} of {key}", function, state=key, moves=True)
        step.given = [("value", _fetched(bound, "tensor"))]
        self._append(step, {"value": [bound]}, operation, key)

    def _becomes(self, bound: _Name, state: str) -> bool:
        """A value is nobody's memory but that of what was computed, and from now on the state's."""
        memory = self._memory[bound.slot]
        if memory in self._inputs or self._written.get(memory, memory) in self._own:
            return self._written.get(memory, memory) == state
        self._written[memory] = state
        return True

    def _call(self, kind: str, name: str, operation: Any, operator: Operator) -> None:
        bound = {key: self._arguments(kind, name, operation, key) for key in operation.inputs}
        if unknown := set(bound) - set(operator.takes):
            raise refused(kind, name, f"its argument {names_of(unknown)} is not known here")
        if missing := operator.needs - set(bound):
            raise refused(kind, name, f"it has no argument {names_of(missing)}")
        step = Step(kind, name, operator.function, moves=operator.moves)
        for key, several in bound.items():
            takes = operator.takes[key]
            if takes == "tensors":
                step.given.append((key, _each([_fetched(each, takes) for each in several])))
                continue
            if len(several) != 1:
                raise refused(kind, name, f"its {key} has {len(several)} values")
            (one,) = several
            if isinstance(one, _Name) and takes in ("plain", "constant"):
                raise refused(kind, name, f"its {key} is computed, and has to be a constant")
            if isinstance(one, _Constant) and takes in ("plain", "computed"):
                step.fixed[key] = _plain(one)
                if step.fixed[key] not in operator.only.get(key, [step.fixed[key]]):
                    raise refused(kind, name, f"its {key} is {step.fixed[key]!r}")
            else:
                step.given.append((key, _fetched(one, takes)))
        _refuse_mixed(kind, name, operation, operator, bound)
        first = next((b for each in bound.values() for b in each if isinstance(b, _Name)), None)
        shared = first is not None and operator.shares
        self._append(step, bound, operation, self._memory[first.slot] if first and shared else None)

    def _append(
        self, step: Step, bound: Mapping[str, list[_Bound]], operation: Any, memory: str | None
    ) -> None:
        """Add a step, and its outputs, which lie in some memory or in one of their own."""
        step.uses = [(k, b.slot) for k, each in bound.items() for b in each if isinstance(b, _Name)]
        for message in operation.outputs:
            type = type_of(message.type.tensorType)
            if message.type.WhichOneof("type") != "tensorType" or type.kind not in HELD:
                raise refused(step.kind, message.name, f"its output is {type}")
            step.outputs.append(Output(message.name, len(self._memory), type, set()))
            self._define(message.name, type, memory or message.name)
        self._steps.append(step)

    def _define(self, name: str, type: Type, memory: str) -> None:
        refuse_vast(name, type)
        self._add(name, _Name(len(self._memory), type))
        self._memory.append(memory)

    def _add(self, name: str, bound: _Bound) -> None:
        self._refuse_known(name)
        self._names[name] = bound

    def _refuse_known(self, name: str) -> None:
        if not name or name in self._names or name in self._own:
            raise malformed(f"it has two values of the name {name!r}")

    def _bound(self, name: str, reader: str) -> _Bound:
        if name not in self._names:
            raise malformed(f"{reader} reads {name!r}, which is not there")
        return self._names[name]

    def _argument(self, kind: str, name: str, operation: Any, key: str) -> _Bound:
        several = self._arguments(kind, name, operation, key)
        if len(several) != 1:
            raise refused(kind, name, f"its {key} has {len(several)} values")
        return several[0]

    def _arguments(self, kind: str, name: str, operation: Any, key: str) -> list[_Bound]:
        found: list[_Bound] = []
        for each in operation.inputs[key].arguments:
            if each.WhichOneof("binding") == "name":
                found.append(self._bound(each.name, f"its operation {kind} {name}"))
            else:
                found.append(self._stated(each.value))
        return found


def _meaning(kind: str, parts: dict[str, Any]) -> Meaning:
    """What a constexpr operation computes; takes from `parts` what it knows."""
    if kind == "constexpr_blockwise_shift_scale":
        data = parts.pop("data")
        inner = data if isinstance(data, Looked) else Plain(data)
        return Scaled.of(inner, parts.pop("scale"), parts.pop("offset", None))
    if kind == "constexpr_lut_to_dense":
        parts.pop("vector_axis", None)  # says nothing of vectors of one number
        return Looked.of(parts.pop("indices"), parts.pop("lut"))
    if kind == "constexpr_cast":
        parts.pop("output_dtype")  # its output says so too
        return Plain(parts.pop("source_val"))
    raise ValueError("no such operation is known here")


def _refuse_mixed(
    kind: str, name: str, operation: Any, operator: Operator, bound: Mapping[str, list[_Bound]]
) -> None:
    """Core ML converts no data type by itself."""
    read = [key for key in _ALIKE & set(bound) if operator.takes[key] not in ("plain", "computed")]
    alike = {each.type.kind for key in read for each in bound[key]}
    made = {type_of(each.type.tensorType).kind for each in operation.outputs}
    floats = made & set(FLOATS) if operator.one and alike else set()
    if len(alike) > 1 or (floats and floats != alike):
        why = f"it is given {names_of(alike)}, and makes {names_of(made)}"
        raise refused(kind, name, why)


def _name_of(argument: Any) -> str:
    names = [str(each.name) for each in argument.arguments]
    return names[0] if len(names) == 1 else ""


def _plain(bound: _Constant) -> Any:
    """A constant as Python's numbers or texts."""
    plain = bound.plain
    if isinstance(plain, Stored):
        return plain.numbers().tolist()
    if isinstance(plain, str | list):
        return plain
    raise malformed(f"a weight {bound.type} is read as numbers that are known before it runs")


def _fetched(bound: _Bound, takes: str) -> Fetch:
    """What finds a value when a step runs."""
    if isinstance(bound, _Name):
        slot = bound.slot
        return (lambda slots: slots[slot].tolist()) if takes == "computed" else itemgetter(slot)
    value = bound.value
    if isinstance(value, Weight) and takes != "table":
        return lambda slots: value.dense()
    if value is None:
        raise malformed(f"codes or texts {bound.type} are read as numbers")
    return lambda slots: value


def _each(fetches: list[Fetch]) -> Fetch:
    return lambda slots: [fetch(slots) for fetch in fetches]
