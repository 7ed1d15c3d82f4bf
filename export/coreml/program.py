"""A small vocabulary for ML Programs: functions of typed operations, as coremltools writes them.

What an operation takes is what coremltools' definitions say, iOS 15 to 18; where it writes a
default, the default is written here too. Sizes are ints, or None where they are known at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..layout import INT4, UINT2, UINT3, UINT4, UINT6, Stored
from .layout import RECORD
from .proto import messages

Shape = tuple[int | None, ...]
FLOAT16, FLOAT32, INT32, BOOL, STRING = "FLOAT16", "FLOAT32", "INT32", "BOOL", "STRING"
TYPES = {
    "<f2": FLOAT16,
    "<f4": FLOAT32,
    "|i1": "INT8",
    "<i4": INT32,
    INT4: "INT4",
    UINT2: "UINT2",
    UINT3: "UINT3",
    UINT4: "UINT4",
    UINT6: "UINT6",
}
BLOB_FILE = "weights/weight.bin"
CASTS = {FLOAT16: "fp16", FLOAT32: "fp32", INT32: "int32"}


class Value(NamedTuple):
    """What an operation makes, or a function is given."""

    name: str
    dtype: str
    shape: Shape


class Flexible(NamedTuple):
    """An input whose sizes may vary: the smallest and the largest of each dimension."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> Shape:
        return tuple(low if low == high else None for low, high in self.ranges)


Number = npt.NDArray[Any] | np.generic | str | bool | int | Sequence[int]
Argument = Value | Sequence[Value] | Number


class Function:
    """A function that grows in the order in which it runs.

    Args:
        opset: such as CoreML8.
        dtype: of what operations make unless they are told otherwise.
    """

    def __init__(self, opset: str, dtype: str = FLOAT16) -> None:
        self.opset, self.dtype = opset, dtype
        self._mil = messages("MIL")
        self._function = self._mil.Function(opset=opset)
        self._block = self._function.block_specializations[opset]
        self._features: dict[str, list[Any]] = {"input": [], "output": [], "state": []}
        self._consts: dict[tuple[str, Shape, bytes], Value] = {}
        self._names: set[str] = set()

    def input(self, name: str, dtype: str, sizes: Sequence[int] | Flexible) -> Value:
        """A tensor that a run is given."""
        shape = sizes.shape if isinstance(sizes, Flexible) else tuple(sizes)
        given = self._function.inputs.add(name=self._own(name))
        given.type.CopyFrom(self._type(dtype, shape))
        feature = _feature(name)
        array = feature.type.multiArrayType
        array.dataType = _data_type(dtype)
        if isinstance(sizes, Flexible):
            for low, high in sizes.ranges:
                array.shape.append(low)
                array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
        else:
            array.shape.extend(sizes)
        self._features["input"].append(feature)
        return Value(name, dtype, shape)

    def state(self, name: str, *shape: int) -> Value:
        """Memory in float16 that keeps what it holds from run to run; zeros at first."""
        given = self._function.inputs.add(name=self._own(name))
        given.type.stateType.wrappedType.CopyFrom(self._type(FLOAT16, shape))
        feature = _feature(name)
        array = feature.type.stateType.arrayType
        array.shape.extend(shape)
        array.dataType = _data_type(FLOAT16)
        self._features["state"].append(feature)
        return Value(name, FLOAT16, shape)

    def output(self, value: Value) -> None:
        """Give a value back, under its name."""
        self._block.outputs.append(value.name)
        feature = _feature(value.name)
        array = feature.type.multiArrayType
        array.dataType = _data_type(value.dtype)
        if None not in value.shape:
            array.shape.extend(value.shape)
        self._features["output"].append(feature)

    def stored(self, tensor: Stored, name: str) -> Value:
        """A tensor of the weight file, as it is."""
        made = self._made("const", name, TYPES[tensor.dtype], tensor.shape)
        self._block.operations[-1].attributes["val"].CopyFrom(self._blob(tensor))
        return made

    def decompressed(
        self, kind: str, name: str, shape: Shape, dtype: str, /, **inputs: Value | Stored | Any
    ) -> Value:
        """A constant that the device makes of constants: an operation `constexpr_*`."""
        made = self._made(kind, name, dtype, shape)
        operation = self._block.operations[-1]
        for key, given in inputs.items():
            argument = operation.inputs[key].arguments.add()
            if isinstance(given, Value):
                argument.name = given.name
            elif isinstance(given, Stored):
                argument.value.CopyFrom(self._blob(given))
            else:
                argument.value.CopyFrom(self._immediate(*_array(given)))
        return made

    def op(
        self, kind: str, name: str, shape: Shape, dtype: str | None = None, /, **inputs: Argument
    ) -> Value:
        """What an operation makes; arguments that are no values become constants.

        A constant goes before the operation that takes it first.
        """
        places = {key: self._places(given, f"{name}_{key}") for key, given in inputs.items()}
        made = self._made(kind, name, dtype or self.dtype, shape)
        operation = self._block.operations[-1]
        for key, names in places.items():
            for each in names:
                operation.inputs[key].arguments.add(name=each)
        return made

    def read(self, state: Value, name: str) -> Value:
        """What a state holds now."""
        return self.op("read_state", name, state.shape, FLOAT16, input=state)

    def write(self, state: Value, value: Value) -> None:
        """Let a state hold a value."""
        operation = self._block.operations.add(type="write_state")
        operation.inputs["input"].arguments.add(name=state.name)
        operation.inputs["data"].arguments.add(name=value.name)

    def message(self) -> Any:
        """The function as a message of MIL.proto."""
        return self._function

    def describe(self, description: Any) -> None:
        """Add its inputs, outputs and states to a message of Model.proto that has such fields."""
        for field, features in self._features.items():
            getattr(description, field).extend(features)

    def _places(self, given: Argument, name: str) -> list[str]:
        if isinstance(given, Value):
            return [given.name]
        if isinstance(given, (list, tuple)) and given and isinstance(given[0], Value):
            return [each.name for each in given]
        return [self.constant(given, name).name]

    def constant(self, given: Any, name: str) -> Value:
        """A number, a text or an array; of this name, unless one of the same value is there."""
        dtype, array = _array(given)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._consts:
            made = self._made("const", name, dtype, array.shape)
            value = self._immediate(dtype, array)
            self._block.operations[-1].attributes["val"].CopyFrom(value)
            self._consts[key] = made
        return self._consts[key]

    def _made(self, kind: str, name: str, dtype: str, shape: Shape) -> Value:
        operation = self._block.operations.add(type=kind)
        output = operation.outputs.add(name=self._own(name))
        output.type.CopyFrom(self._type(dtype, shape))
        written = self._immediate(STRING, np.array(name))
        operation.attributes["name"].CopyFrom(written)
        return Value(name, dtype, shape)

    def _own(self, name: str) -> str:
        if name in self._names:
            raise ValueError(f"two values are called {name}")
        self._names.add(name)
        return name

    def _type(self, dtype: str, shape: Shape) -> Any:
        found = self._mil.ValueType()
        tensor = found.tensorType
        tensor.dataType = self._mil.DataType.Value(dtype)
        tensor.rank = len(shape)
        for size in shape:
            dimension = tensor.dimensions.add()
            if size is None:
                dimension.unknown.SetInParent()
            else:
                dimension.constant.size = size
        return found

    def _blob(self, tensor: Stored) -> Any:
        found = self._mil.Value(type=self._type(TYPES[tensor.dtype], tensor.shape))
        found.blobFileValue.fileName = f"@model_path/{BLOB_FILE}"
        found.blobFileValue.offset = tensor.offset - RECORD
        return found

    def _immediate(self, dtype: str, array: npt.NDArray[Any]) -> Any:
        found = self._mil.Value(type=self._type(dtype, array.shape))
        tensor, flat = found.immediateValue.tensor, array.reshape(-1)
        if dtype == STRING:
            tensor.strings.values.extend(map(str, flat))
        elif dtype == BOOL:
            tensor.bools.values.extend(map(bool, flat))
        elif dtype == INT32:
            tensor.ints.values.extend(map(int, flat))
        elif dtype == FLOAT32:
            tensor.floats.values.extend(map(float, flat))
        else:
            tensor.bytes.values = flat.tobytes()
        return found


def program(functions: Mapping[str, Function]) -> Any:
    """An ML Program of these functions, as a message of MIL.proto."""
    found = messages("MIL").Program(version=1)
    for name, function in functions.items():
        found.functions[name].CopyFrom(function.message())
    return found


def _array(given: Any) -> tuple[str, npt.NDArray[Any]]:
    """The type and value of a constant: ints are int32; arrays keep the type that they have."""
    if isinstance(given, str):
        return STRING, np.array(given)
    if isinstance(given, bool) or (
        isinstance(given, (list, tuple)) and given and isinstance(given[0], bool)
    ):
        return BOOL, np.array(given, bool)
    if isinstance(given, (np.ndarray, np.generic)):
        array = np.asarray(given)
        return TYPES[array.dtype.str], array
    return INT32, np.array(given, np.int32)


def _feature(name: str) -> Any:
    return messages("Model").FeatureDescription(name=name)


def _data_type(dtype: str) -> int:
    types = messages("FeatureTypes").ArrayFeatureType.ArrayDataType
    return int(types.Value(dtype))
