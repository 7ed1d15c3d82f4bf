"""A function of an ML Program as its interpreter runs it: steps, slots between them, and states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mil_operator import bounded
from .mil_package import Type, malformed

HELD = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float32,
    "FLOAT32": torch.float32,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "UINT8": torch.uint8,
    "UINT16": torch.int32,  # torch computes little in uint16
}
FLOATS = ("FLOAT16", "FLOAT32")
Fetch = Callable[[list[Any]], Any]  # finds a value in the slots


class States:
    """Tensors that outlive a run, by name: float32 where the program says FLOAT16 too.

    Functions that are given the same States share those of the same name, as functions share one
    MLState.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._types: dict[str, Type] = {}

    def add(self, name: str, type: Type) -> None:
        """Zeros, unless it is there.

        Raises:
            ValidationFailed: it is there with another type, or has no fixed shape.
        """
        if self._types.setdefault(name, type) != type:
            raise malformed(f"its state {name} is {self._types[name]} and {type}")
        if name in self.tensors:
            return
        shape = [size for size in type.shape if size is not None]
        if type.kind not in HELD or len(shape) != len(type.shape):
            raise malformed(f"its state {name} is {type}")
        refuse_vast(name, type)
        self.tensors[name] = torch.zeros(shape, dtype=HELD[type.kind])

    def reset(self) -> None:
        """Zeros everywhere."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = torch.zeros_like(tensor)


class Output(NamedTuple):
    """What an operation makes.

    Attributes:
        seen: shapes that were found to be as declared.
        scores: only a softmax reads it, for which a number below all of float16 is -inf.
    """

    name: str
    slot: int
    type: Type
    seen: set[tuple[int, ...]]
    scores: bool = False


@dataclass(slots=True)
class Step:
    """A call.

    Attributes:
        name: of its first output.
        fixed: arguments that are always the same.
        given: arguments that are found in the slots.
        uses: those of them that a run computes, and their slots.
        state: that it reads or writes.
        moves: its numbers are those that it was given.
        frees: slots that nothing reads any more.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    given: list[tuple[str, Fetch]] = field(default_factory=list)
    uses: list[tuple[str, int]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    state: str | None = None
    moves: bool = False
    frees: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a program.

    Attributes:
        inputs, outputs, states: {name: type}, as declared.
        places: {input: slot}.
        results: {output: what finds it}.
        slots: how many there are.
    """

    inputs: dict[str, Type]
    outputs: dict[str, Type]
    states: dict[str, Type]
    places: dict[str, int]
    results: dict[str, Fetch]
    steps: list[Step]
    slots: int


def refuse_vast(name: str, type: Type) -> None:
    """Raise ValidationFailed if no decoder has tensors of that size."""
    try:
        bounded([size or 1 for size in type.shape])
    except ValueError as error:
        raise malformed(f"{name} is {type}, which no decoder has") from error
