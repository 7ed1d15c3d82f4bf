"""An interpreter of ML Programs, the programs in Core ML packages, on the CPU.

Core ML runs on Apple's machines only. This reads the shipped package and runs it operation by
operation, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import SlimportError, ValidationFailed
from .mil_features import features
from .mil_package import Package, Type, malformed, names_of, refused
from .mil_program import build
from .mil_step import HELD, Output, States, Step

__all__ = ["Interpreter", "States", "functions", "refuse_overflow"]

ROOM = 1 << 30
_LARGEST = float(np.finfo(np.float16).max)


def functions(package: Path) -> list[str]:
    """The names of a package's functions, the default one first.

    Raises:
        BadInput, ValidationFailed: the package cannot be read.
    """
    return Package.open(package).functions


def refuse_overflow(peaks: Mapping[str, tuple[str, float]]) -> None:
    """Raise ValidationFailed if one of {output: (operation, largest magnitude)} exceeds float16."""
    for name, (kind, peak) in peaks.items():
        if not peak <= _LARGEST:
            raise ValidationFailed(
                f"{kind} {name} computes numbers that do not fit float16",
                f"they reach {peak:.6g} and float16 ends at {_LARGEST:.0f}: a phone would make them"
                " infinite, whatever float32 shows",
                "choose a container that computes in float32",
            )


class Interpreter:
    """A function of a package, and its states.

    Args:
        package: the .mlpackage.
        function: its name; None is the default one.
        rounding: "fp16" rounds each tensor that the program declares FLOAT16 to it when an
            operation has made it, states too; inside an operation all is float32. "fp32" rounds
            nothing: that is what the program means.
        room: bytes for weights in float32; those beyond it are computed each time they are read.
        states: shared with other functions of the package.

    Attributes:
        inputs, outputs, states: {name: its data type and shape}, None where any size may be.
        peaks: {output of an operation: (its type, the largest magnitude it ever made)}, before
            rounding, of what is FLOAT16 and computed, not moved. NaN counts as infinite. -inf does
            not count: it masks. Nor do negative numbers that only a softmax or an exp will read,
            directly or as a sum, a maximum or a choice: they become 0 there, as -inf does.

    Raises:
        BadInput: the package is not there.
        ValidationFailed: it is inconsistent, or the interpreter does not know what it asks for.
    """

    def __init__(
        self,
        package: Path,
        function: str | None = None,
        *,
        rounding: Literal["fp16", "fp32"],
        room: int = ROOM,
        states: States | None = None,
    ) -> None:
        opened = Package.open(package)
        self._half = rounding == "fp16"
        self._states = States() if states is None else states
        name = opened.functions[0] if function is None else function
        self._function = build(opened, name, self._states, room, self._half)
        self._features = features(opened, name, self._function)
        self.inputs: dict[str, Type] = self._function.inputs
        self.outputs: dict[str, Type] = self._function.outputs
        self.states: dict[str, Type] = self._function.states
        self.peaks: dict[str, tuple[str, float]] = {}

    def reset(self) -> None:
        """Make all states zeros, shared ones too."""
        self._states.reset()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The function's outputs: floats as float32, integers as the program declares them.

        Args:
            inputs: floats of any type, or integers of any type that the declared one has room for.

        Raises:
            ValidationFailed: inputs are not as declared, or an operation fails, or makes another
                shape or data type than the program declares for it.
        """
        slots: list[Any] = [None] * self._function.slots
        with torch.inference_mode():
            for name, tensor in self._checked(inputs).items():
                slots[self._function.places[name]] = tensor
            for step in self._function.steps:
                self._run(step, slots)
        return {name: find(slots).clone() for name, find in self._function.results.items()}

    def _run(self, step: Step, slots: list[Any]) -> None:
        arguments = dict(step.fixed)
        try:
            for name, find in step.given:
                arguments[name] = find(slots)
            made = step.function(**arguments)
        except SlimportError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            why = str(error).partition("\n")[0]
            raise refused(step.kind, step.name, f"it cannot be run: {why}") from error
        if step.outputs:
            several = made if isinstance(made, tuple) else (made,)
            if len(several) != len(step.outputs):
                raise refused(step.kind, step.name, f"it makes {len(several)} tensors")
            for output, tensor in zip(step.outputs, several, strict=True):
                slots[output.slot] = self._taken(step, output, tensor)
        for slot in step.frees:
            slots[slot] = None

    def _taken(self, step: Step, output: Output, made: Tensor) -> Tensor:
        """What an operation made, checked, counted and rounded."""
        kind, shape = output.type
        if made.shape not in output.seen:
            if not _fits(made, shape):
                raise refused(step.kind, output.name, f"it makes {tuple(made.shape)}, and the"
                              f" program declares {output.type}")  # fmt: skip
            output.seen.add(made.shape)
        if made.dtype is not HELD[kind]:
            raise refused(step.kind, output.name, f"it makes {made.dtype}, and the program declares"
                          f" {output.type}")  # fmt: skip
        if kind != "FLOAT16" or step.moves:
            return made
        peak = _magnitude(made, output.scores)
        if output.name not in self.peaks or peak > self.peaks[output.name][1]:
            self.peaks[output.name] = step.kind, peak
        return made.half().float() if self._half else made

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(inputs) != set(self.inputs):
            raise malformed(f"it takes {names_of(self.inputs)}, and is given {names_of(inputs)}")
        found = {}
        for name, (kind, shape) in self.inputs.items():
            given = inputs[name]
            held = given.to(HELD[kind])
            whole = not given.is_floating_point()
            admitted = self._features[name].admits(tuple(given.shape))
            if not admitted or not _fits(given, shape) or whole == held.is_floating_point():
                raise malformed(f"its input {name} is {self.inputs[name]}, and is given"
                                f" {given.dtype} {tuple(given.shape)}")  # fmt: skip
            if whole and not torch.equal(held.to(given.dtype), given):
                raise malformed(f"its input {name} has no room for what it is given")
            found[name] = held.half().float() if self._half and kind == "FLOAT16" else held
        return found


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )


def _magnitude(made: Tensor, scores: bool) -> float:
    """The largest one of numbers but -inf; of positive ones if they are scores."""
    if not made.numel():
        return 0.0
    low, high = (float(each) for each in torch.aminmax(made))
    if math.isnan(high):
        return math.inf
    if low == -math.inf and not scores:
        low = float(made.masked_fill(made == -math.inf, 0).min())
    return max(high, 0.0) if scores else max(high, -low, 0.0)
