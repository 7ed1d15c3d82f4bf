"""Other codes for the weights of a ggml block, under the scales that it has."""

from __future__ import annotations

import numpy as np

from .blocks import BlockTensor
from .codes import CODES, Indices
from .compiled import compiled
from .ggml import BLOCKS, UInt8
from .grid import Float32


def replace_codes(tensor: BlockTensor, codes: UInt8, columns: Indices) -> BlockTensor:
    """`tensor` with other codes in some columns.

    Args:
        codes: uint8 (rows, len(columns)).
        columns: int64, which columns of the weight; each at most once.
    """
    size, length = BLOCKS[tensor.grid.type]
    blocks = tensor.blocks.copy()
    block, within = np.divmod(columns, size)
    for part in CODES[tensor.grid.type].parts:
        byte = block * length + part.byte[within]
        _insert(blocks, codes, byte, part.shift[within], part.first, part.count)
    return BlockTensor(tensor.grid, blocks)


def low_and_step(tensor: BlockTensor) -> tuple[Float32, Float32]:
    """What every group's codes mean: two times float32 (rows, groups); a step may be 0 or less."""
    known = CODES[tensor.grid.type]
    rows, columns = tensor.shape
    every = np.arange(columns)
    last = len(known.levels) - 1
    ends = []
    for code in (0, last):
        filled = replace_codes(tensor, np.full((rows, columns), code, np.uint8), every)
        ends.append(np.ascontiguousarray(filled.dequantize()[:, :: known.group]))
    low, high = ends
    return low, (high - low) / known.levels[last]


@compiled
def _insert(
    blocks: UInt8, codes: UInt8, byte: Indices, shift: Indices, first: int, count: int
) -> None:
    ones = (1 << count) - 1
    for row in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            bits = (np.int64(codes[row, j]) >> first) & ones
            kept = np.int64(blocks[row, byte[j]]) & ~(ones << shift[j])
            blocks[row, byte[j]] = np.uint8(kept | (bits << shift[j]))
