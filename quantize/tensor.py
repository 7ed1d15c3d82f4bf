"""A quantized weight: grid, codes and scales, checked when it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from .grid import Float32, Grid, Int8, UInt8


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight matrix of shape (rows, columns) on a grid.

    Attributes:
        grid: what the codes mean.
        codes: int8 (rows, columns), each within grid.low..grid.high, in source row order.
        scale: float32 (rows, groups), of the grid's significant bits; an all-zero group has
            scale 1 where slimport chose it.

    Raises:
        BadInput: a shape or dtype disagrees with the grid.
    """

    grid: Grid
    codes: Int8
    scale: Float32

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        wanted = (rows, self.grid.groups(columns))
        if self.codes.dtype != np.int8 or self.scale.dtype != np.float32:
            raise _inconsistent(f"codes are {self.codes.dtype}, scales {self.scale.dtype}")
        if not self.grid.fits(self.shape) or self.scale.shape != wanted:
            raise _inconsistent(
                f"codes {self.codes.shape} on {self.grid.name} need scales {wanted},"
                f" not {self.scale.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> Float32:
        """The represented weights, float32 (rows, columns); exact: one product per weight."""
        rows, columns = self.codes.shape
        groups = self.scale.shape[1]
        codes = self.codes.reshape(rows, groups, columns // groups)
        if self.grid.levels is None:
            grouped = codes.astype(np.float32)
        else:
            grouped = np.array(self.grid.levels, np.float32)[codes - np.int8(self.grid.low)]
        grouped *= self.scale[:, :, None]
        return grouped.reshape(rows, columns)

    def from_zero(self) -> tuple[Int8, UInt8]:
        """Codes that count from 0 on, int8 (rows, columns), and zero points, uint8 (rows, groups).

        value = (code - zero point) * scale, in grids that are asymmetric.

        Raises:
            BadInput: the codes of a group lie further from each other than the grid has bits for.
        """
        zero_points = self.grid.zero_points(self.codes)
        rows, groups = zero_points.shape
        codes = self.codes.reshape(rows, groups, -1) + zero_points.view(np.int8)[:, :, None]
        top = max(int(codes.max(initial=0)), int(zero_points.max(initial=0)))
        if top >= 1 << self.grid.bits:
            raise _inconsistent(f"codes from 0 to {top} do not fit into {self.grid.bits} bits")
        return codes.reshape(self.codes.shape), zero_points

    def digest(self, name: str) -> str:
        """sha256 (hex) over name, grid, shape, codes (int8) and scales (float32, little-endian).

        Row-major. `name` is the weight's source name, such as
        `model.layers.0.mlp.up_proj.weight`.
        """
        digest = start_digest(name, self.grid.name, self.shape)
        digest.update(np.ascontiguousarray(self.codes).data)
        digest.update(np.ascontiguousarray(self.scale, "<f4").data)
        return digest.hexdigest()


def start_digest(name: str, kind: str, shape: Sequence[int]) -> hashlib._Hash:
    """The sha256 of one tensor before its content; `kind` is a grid's name or "float32".

    Codes and then scales follow row by row, so a tensor can be hashed while it is made.
    """
    return hashlib.sha256(f"{name}\n{kind}\n{' '.join(map(str, shape))}\n".encode())


def weights_digest(digests: Mapping[str, str]) -> str:
    """One digest of all quantized weights, `sha256:...`, from {source name: digest of it}.

    sha256 over the lines `<name> <digest>` in sorted order of names, so weights can be hashed one
    at a time, in any order, and a mismatch can be named.
    """
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _inconsistent(why: str) -> BadInput:
    return BadInput("a quantized weight is inconsistent", why, "quantize the model again")
