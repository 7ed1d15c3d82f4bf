"""What a model says of itself to the program that runs it: the features of its functions.

Core ML loads no model whose description names other inputs, outputs or states than its program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .mil_package import Package, Type, malformed, names_of
from .mil_step import Function

_KINDS = {65552: "FLOAT16", 65568: "FLOAT32", 131104: "INT32"}  # of ArrayFeatureType


class Feature(NamedTuple):
    """An array.

    Attributes:
        shapes: that it may have.
        ranges: of sizes that it may have beside them, both ends included; -1 is no end.
    """

    kind: str
    shapes: list[tuple[int, ...]]
    ranges: list[tuple[int, int]] | None

    @classmethod
    def of(cls, array: Any) -> Feature:
        """What a message ArrayFeatureType says."""
        kind = _KINDS.get(array.dataType, f"data type {array.dataType}")
        shapes = [tuple(map(int, array.shape))]
        shapes += [tuple(map(int, each.shape)) for each in array.enumeratedShapes.shapes]
        sizes = array.shapeRange.sizeRanges
        ranges = [(int(each.lowerBound), int(each.upperBound)) for each in sizes]
        return cls(kind, shapes, ranges or None)

    def admits(self, shape: tuple[int, ...]) -> bool:
        if self.ranges is None or len(self.ranges) != len(shape):
            return shape in self.shapes
        sizes = zip(shape, self.ranges, strict=True)
        return all(low <= size and (size <= high or high < 0) for size, (low, high) in sizes)

    def goes_with(self, type: Type) -> bool:
        """Each shape that it admits is one of the type's."""
        ends = [tuple(each[end] for each in self.ranges or []) for end in (0, 1)]
        shapes = [*self.shapes, *(ends if self.ranges else [])]
        return self.kind == type.kind and all(
            len(shape) == len(type.shape)
            and all(size in (None, given) for size, given in zip(type.shape, shape, strict=True))
            for shape in shapes
        )


def features(package: Package, name: str, function: Function) -> dict[str, Feature]:
    """{input: what a caller may give}, of a function.

    Raises:
        ValidationFailed: the description is not that of the program.
    """
    description = package.model.description
    if description.functions:
        told = [each for each in description.functions if each.name == name]
        if len(told) != 1:
            raise malformed(f"its description has no function {name}")
        description = told[0]
    inputs = {each.name: Feature.of(each.type.multiArrayType) for each in description.input}
    states = {each.name: Feature.of(each.type.stateType.arrayType) for each in description.state}
    outputs = {each.name: Feature.of(each.type.multiArrayType) for each in description.output}
    for feature in outputs.values():
        if not feature.shapes[0]:  # it may be left open
            feature.shapes.clear()
    _refuse_others("input", inputs, function.inputs)
    _refuse_others("state", states, function.states)
    _refuse_others("output", outputs, function.outputs)
    return inputs


def _refuse_others(what: str, told: Mapping[str, Feature], types: Mapping[str, Type]) -> None:
    if set(told) != set(types):
        raise malformed(f"its description names the {what}s {names_of(told)}, its program"
                        f" {names_of(types)}")  # fmt: skip
    for name, feature in told.items():
        if not feature.goes_with(types[name]):
            raise malformed(f"its description says {feature.kind} {feature.shapes[:1]} of {what}"
                            f" {name}, its program {types[name]}")  # fmt: skip
