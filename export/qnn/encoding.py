"""Activations as 16-bit integers: value = (code - zero) * scale, one pair for a whole tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...quantize.grid import Float32

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the integers of a tensor mean.

    Keys and values of the cache are int16 with zero 0: the NPU silently cuts the second factor of
    a product of two uint16 tensors to 8 bits, and leaves int16 alone.

    Attributes:
        scale: a float32 number.
    """

    scale: float
    zero: int
    dtype: Literal["uint16", "int16"]

    def encode(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Nearest codes; what lies outside becomes the first or the last one."""
        info = np.iinfo(self.dtype)
        codes = np.rint(values.astype(np.float32) / np.float32(self.scale)) + self.zero
        found: npt.NDArray[Any] = np.clip(codes, info.min, info.max).astype(self.dtype)
        return found

    def decode(self, codes: npt.NDArray[Any]) -> Float32:
        values: Float32 = (codes.astype(np.float32) - np.float32(self.zero)) * np.float32(
            self.scale
        )
        return values


def encoding_of(low: float, high: float, *, cache: bool = False) -> Encoding:
    """The finest encoding of a range; zero is always a value of it."""
    low, high = min(low, 0.0), max(high, 0.0)
    if cache:
        return Encoding(_scale(max(-low, high), 32767), 0, "int16")
    scale = _scale(high - low, 65535)
    return Encoding(scale, int(np.clip(round(-low / scale), 0, 65535)), "uint16")


def _scale(span: float, steps: int) -> float:
    return float(np.float32(max(span, 1e-8) / steps))


class Encodings:
    """The encoding of every tensor of a graph; tensors that are only moved share one.

    Args:
        ranges: {tensor: smallest and largest value}.
        tied: pairs of tensors that hold the same values, in another order.
        caches: tensors whose group is int16.
    """

    def __init__(
        self, ranges: Mapping[str, Range], tied: Iterable[tuple[str, str]], caches: Iterable[str]
    ) -> None:
        self._leaders: dict[str, str] = {}
        for first, second in tied:
            if self.leader(first) != self.leader(second):
                self._leaders[self.leader(second)] = self.leader(first)
        bounds: dict[str, Range] = {}
        for name, (low, high) in ranges.items():
            before = bounds.get(self.leader(name), (0.0, 0.0))
            bounds[self.leader(name)] = min(low, before[0]), max(high, before[1])
        signed = {self.leader(name) for name in caches}
        self._found = {
            name: encoding_of(*bound, cache=name in signed) for name, bound in bounds.items()
        }

    def leader(self, name: str) -> str:
        """The tensor that names the group of this one."""
        while name in self._leaders:
            name = self._leaders[name]
        return name

    def __getitem__(self, name: str) -> Encoding:
        return self._found[self.leader(name)]
