"""ggml's own types as grids: super-blocks that are kept byte for byte, for GGUF alone.

Their scales are numbers of few bits times scales of scales, so they are no `Grid`; what ggml's
kernel or GPTQ made is stored, hashed, packed and read back as the bytes that it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from .ggml import BLOCKS, Type, UInt8, dequantize_rows, quantize_rows, row_bytes
from .grid import GRIDS, Float32, Grid
from .palette import PALETTE_GRIDS, PaletteGrid, PaletteTensor
from .tensor import QuantizedTensor, start_digest


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The weights that a ggml type can represent."""

    type: Type

    @property
    def name(self) -> str:
        return self.type.name

    @property
    def group(self) -> int:
        """Weights of one block."""
        return BLOCKS[self.type][0]

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the rows of a matrix of `shape` divide into whole blocks."""
        return shape[1] % self.group == 0

    def bits_per_weight(self, columns: int) -> float:
        size, length = BLOCKS[self.type]
        return 8 * length / size

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Bytes of all blocks of a matrix of `shape`."""
        return shape[0] * row_bytes(self.type, shape[1])


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A weight matrix in ggml's blocks.

    Attributes:
        blocks: uint8 (rows, bytes of a row), in source row order.

    Raises:
        BadInput: rows are not whole blocks.
    """

    grid: BlockGrid
    blocks: UInt8

    def __post_init__(self) -> None:
        length = BLOCKS[self.grid.type][1]
        if self.blocks.dtype != np.uint8 or self.blocks.ndim != 2 or self.blocks.shape[1] % length:
            raise BadInput(
                "a quantized weight is inconsistent",
                f"{self.blocks.dtype} {self.blocks.shape} are not rows of {self.grid.name}",
                "quantize the model again",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (rows, columns)."""
        size, length = BLOCKS[self.grid.type]
        return len(self.blocks), self.blocks.shape[1] // length * size

    def dequantize(self) -> Float32:
        """The represented weights by ggml's own kernel, float32 (rows, columns)."""
        return dequantize_rows(self.grid.type, self.blocks, self.shape[1])

    def digest(self, name: str) -> str:
        """sha256 (hex) over name, type, shape and all blocks, row-major."""
        digest = start_digest(name, self.grid.name, self.shape)
        digest.update(np.ascontiguousarray(self.blocks).data)
        return digest.hexdigest()


AnyGrid = Grid | PaletteGrid | BlockGrid
Quantized = QuantizedTensor | PaletteTensor | BlockTensor

_FLOATS = (Type.F32, Type.F16, Type.BF16)
BLOCK_GRIDS = {kind.name: BlockGrid(kind) for kind in Type if kind not in _FLOATS}
ANY_GRIDS: dict[str, AnyGrid] = {**GRIDS, **PALETTE_GRIDS, **BLOCK_GRIDS}


_LEAST = np.float32(1e-8)  # importance, of the largest


def solve(weight: Float32, grid: BlockGrid, importance: Float32 | None = None) -> BlockTensor:
    """Quantize by ggml's own kernel.

    Args:
        weight: float32 (rows, columns); rows are independent.
        importance: float32 (columns,), the mean of x^2 of each input, or None. An input that never
            mattered counts a little: a block of such inputs would become zeros.

    Raises:
        Unsupported: rows do not divide into blocks, or the type needs an importance matrix.
    """
    if importance is not None:
        importance = np.maximum(importance, _LEAST * (importance.max() or 1))
    return BlockTensor(grid, quantize_rows(grid.type, weight, importance))
