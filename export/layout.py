"""Which tensors the data of a container holds, where, and of which weights each is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ..architectures import DecoderConfig, Kind
from ..quantize.grid import Grid
from ..quantize.plan import Choice

ALIGNMENT = 64
INT4, UINT6, UINT4, UINT3, UINT2 = "int4", "uint6", "uint4", "uint3", "uint2"
_BITS = {INT4: 4, UINT6: 6, UINT4: 4, UINT3: 3, UINT2: 2}

Part = Literal["codes", "scale", "levels", "zero_point", "values"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the data file.

    Attributes:
        dtype: as numpy writes it, such as "<f2", or one of fewer bits, such as INT4, packed.
        choices: the weights it is made of, one after the other along their rows; none for a table
            of the rope.
        part: what of these weights it holds.
        offset: of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    choices: tuple[Choice, ...]
    part: Part
    offset: int = 0

    @property
    def nbytes(self) -> int:
        bits = _BITS.get(self.dtype) or 8 * np.dtype(self.dtype).itemsize
        return -(-math.prod(self.shape) * bits // 8)

    @property
    def unused_bits(self) -> int:
        """Of the last byte."""
        bits = _BITS.get(self.dtype) or 8 * np.dtype(self.dtype).itemsize
        return -math.prod(self.shape) * bits % 8


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix product of the graph: a weight, or several that read the same input.

    Attributes:
        name: of its tensors, such as `model.layers.0.self_attn.qkv_proj`.
        choices: the weights, one after the other along their rows; all have the same grid.
        bias: their biases in the same order; empty where they have none.
    """

    name: str
    choices: tuple[Choice, ...]
    bias: tuple[Choice, ...] = ()

    @property
    def kind(self) -> Kind:
        return Kind.QKV if len(self.choices) > 1 else self.choices[0].weight.kind

    @property
    def layer(self) -> int | None:
        return self.choices[0].weight.layer

    @property
    def grid(self) -> Grid | None:
        grid = self.choices[0].grid
        assert grid is None or isinstance(grid, Grid), "layout refuses ggml's blocks"
        return grid

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return _rows(self.choices), self.choices[0].weight.shape[1]


class Layout:
    """Where everything lies: the matrices that are multiplied, and every tensor of the data.

    Args:
        matrices: in the order of the forward pass.
        tensors: in the order of the file; their offsets are set here.
        head: bytes before the first tensor.
        record: bytes before each tensor.
    """

    def __init__(
        self,
        matrices: Iterable[Matrix],
        tensors: Iterable[Stored],
        head: int = 0,
        record: int = 0,
    ) -> None:
        self.matrices = {(matrix.layer, matrix.kind): matrix for matrix in matrices}
        placed, end = [], head
        for tensor in tensors:
            placed.append(replace(tensor, offset=end + record))
            end = padded(end + record + tensor.nbytes)
        self.tensors, self.nbytes = tuple(placed), end

    @cached_property
    def by_name(self) -> dict[str, Stored]:
        return {tensor.name: tensor for tensor in self.tensors}

    def bytes_by_weight(self) -> dict[str, int]:
        """{source name: bytes of its tensors}; those of several weights by their rows."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            rows = _rows(tensor.choices)
            for choice in tensor.choices:
                share = tensor.nbytes * choice.weight.shape[0] // rows
                found[choice.weight.name] = found.get(choice.weight.name, 0) + share
        return found


def shortest_window(config: DecoderConfig) -> int:
    """The longest text that no window of the decoder cuts."""
    windows = (config.attention(layer).window for layer in range(config.layers))
    return min([config.context_length, *(window for window in windows if window is not None)])


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _rows(choices: Iterable[Choice]) -> int:
    return sum(choice.weight.shape[0] for choice in choices)
