"""What an operation of an ML Program is to its interpreter, and the sizes that one may make."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from .mil_weights import Weight

# How an operator's function names what it takes; any other annotation is a value that the program
# has to state as a constant, and is given as numbers, texts or lists of Python.
Constant = Tensor  # stated in the program: a weight
Table = Tensor | Weight  # not computed if the function can do without all of it
Computed = Any  # a number or a list of numbers, stated or computed by the program
_TAKES = {"Tensor": "tensor", "Constant": "constant", "Table": "table", "Computed": "computed"}
_TAKES |= {"list[Tensor]": "tensors"}
MOST = 1 << 29  # numbers that a shape computed by a program may ask for


class Operator:
    """An operation of a type.

    Args:
        function: computes its outputs; its parameters are the operation's, with their defaults.
        only: the values that an argument may have, which is then a constant.
        moves: its numbers are those that it was given: they are neither rounded nor counted.
        shares: its output may lie in the memory of what it was given.
        one: floats that it makes are of the type of those that it is given.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        only: Mapping[str, Sequence[Any]] | None = None,
        *,
        moves: bool = False,
        shares: bool = False,
        one: bool = True,
    ) -> None:
        self.function, self.only = function, only or {}
        self.moves, self.shares, self.one = moves or shares, shares, one

    @cached_property
    def takes(self) -> dict[str, str]:
        """{argument: tensor, tensors, constant, table, computed or plain}."""
        found = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            annotation = str(parameter.annotation).removesuffix(" | None")
            bare = parameter.annotation is inspect.Parameter.empty
            found[name] = "tensor" if bare else _TAKES.get(annotation, "plain")
        return found

    @cached_property
    def needs(self) -> set[str]:
        """The arguments that have no default."""
        parameters = inspect.signature(self.function).parameters.items()
        return {name for name, each in parameters if each.default is inspect.Parameter.empty}


def bounded(shape: Sequence[int]) -> Sequence[int]:
    """The shape; raises ValueError if it asks for more than any decoder has."""
    if any(size < 0 for size in shape) or math.prod(shape) > MOST:
        raise ValueError(f"it makes {tuple(shape)}")
    return shape
