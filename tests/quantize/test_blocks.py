"""ggml's types as grids: sizes, values by another reader, digests, and what is no such tensor."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from slimport.errors import BadInput, Unsupported
from slimport.quantize import blocks, ggml
from slimport.quantize.blocks import BLOCK_GRIDS, BlockGrid, BlockTensor
from slimport.quantize.ggml import Type
from slimport.quantize.grid import Float32


def weight(rows: int = 3, columns: int = 512) -> Float32:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def solved(kind: str, rows: int = 3) -> BlockTensor:
    return blocks.solve(weight(rows), BLOCK_GRIDS[kind], np.ones(512, np.float32))


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_shape_and_bytes_are_those_of_the_blocks(name: str) -> None:
    tensor = solved(name)
    assert tensor.shape == (3, 512)
    assert tensor.grid.bytes_of((3, 512)) == tensor.blocks.size
    assert tensor.grid.bits_per_weight(512) == 8 * tensor.blocks.size / (3 * 512)


@pytest.mark.parametrize(
    "name", [n for n in BLOCK_GRIDS if n in gguf.GGMLQuantizationType.__members__]
)
def test_gguf_reads_the_same_values(name: str) -> None:
    tensor = solved(name)
    theirs = gguf.quants.dequantize(tensor.blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(tensor.dequantize(), theirs)


def test_rows_of_a_matrix_are_independent() -> None:
    whole = solved("Q4_K", 7).blocks
    importance = np.ones(512, np.float32)
    parts = [
        blocks.solve(weight(7)[i : i + 2], BlockGrid(Type.Q4_K), importance) for i in (0, 2, 4, 6)
    ]
    np.testing.assert_array_equal(np.concatenate([part.blocks for part in parts]), whole)


def test_the_digest_covers_name_type_shape_and_every_byte() -> None:
    tensor = solved("Q4_0")
    other = tensor.blocks.copy()
    other[2, -1] ^= 1
    digests = {
        tensor.digest("a"),
        tensor.digest("b"),
        BlockTensor(tensor.grid, other).digest("a"),
        BlockTensor(BLOCK_GRIDS["IQ4_NL"], tensor.blocks).digest("a"),
        BlockTensor(tensor.grid, tensor.blocks.reshape(1, -1)).digest("a"),
    }
    assert len(digests) == 5


def test_what_is_no_row_of_blocks_is_refused() -> None:
    for array in (np.zeros((2, 143), np.uint8), np.zeros((2, 144), np.int8)):
        with pytest.raises(BadInput, match="are not rows of Q4_K"):
            BlockTensor(BlockGrid(Type.Q4_K), array)
    with pytest.raises(Unsupported, match="row of 100 weights cannot be Q4_K"):
        blocks.solve(weight(2, 100), BlockGrid(Type.Q4_K))
    assert not BlockGrid(Type.Q4_K).fits((256, 576)) and BlockGrid(Type.Q8_0).fits((1, 576))


def test_every_type_but_floats_is_a_grid() -> None:
    assert set(BLOCK_GRIDS) == {kind.name for kind in Type} - {"F32", "F16", "BF16"}
    assert set(ggml.BLOCKS) == set(Type)
