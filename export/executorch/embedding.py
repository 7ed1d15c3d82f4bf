"""The embedding of a program: looked up by a kernel on the CPU, whatever computes the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...quantize.grid import Grid
from ...quantize.plan import Choice
from ..layout import Stored
from .program import Method
from .subgraph import TOKENS, Tensor

LOOKUPS = ("int4-g32", "int8-row", "int8-g32")
LOOKUP = ".lookup"  # tensors of a table that only the kernel reads
_BYTE = (-128, 127)
_NIBBLE = (-8, 7)


def table(embedding: Choice) -> Iterator[Stored]:
    """What the kernel that looks rows up reads: codes and scale, or values."""
    stem = embedding.weight.name.removesuffix(".weight")
    grid, (rows, columns) = embedding.grid, embedding.weight.shape
    if grid is None:
        shape = (rows, columns)
        yield Stored(f"{stem}{LOOKUP}.weight", "<f2", shape, (embedding,), "values")
        return
    assert isinstance(grid, Grid), "layout refuses ggml's blocks"
    if grid.bits == 8:
        # Equal to what is multiplied where each row has one scale.
        yield from matrix_of_bytes(stem, embedding, grid)
        return
    yield Stored(f"{stem}{LOOKUP}.codes", "|u1", (rows, columns // 2), (embedding,), "codes")
    scales = (rows, grid.groups(columns))
    yield Stored(f"{stem}{LOOKUP}.scale", "<f4", scales, (embedding,), "scale")


def matrix_of_bytes(stem: str, choice: Choice, grid: Grid) -> Iterator[Stored]:
    """Codes and scales of a matrix whose codes have 8 bits."""
    rows, columns = choice.weight.shape
    yield Stored(f"{stem}.codes", "|i1", (rows, columns), (choice,), "codes")
    yield Stored(f"{stem}.scale", "<f4", (rows, grid.groups(columns)), (choice,), "scale")


def rows(method: Method, held: Sequence[Stored], tokens: Tensor, width: int) -> Tensor:
    """Rows of the embedding, float32 (1, n, width); `held` is what `table` says."""
    shape = (1, TOKENS, width)
    found = method.constant(held[0])
    if len(held) == 1:
        operator = "aten::embedding.out"
        half = method.made(operator, found, tokens, -1, False, False, dtype="float16", shape=shape)
        return method.made("aten::_to_copy.out", half, False, None, shape=shape)
    if held[0].dtype == "|i1":
        operator, ends = "quantized_decomposed::embedding_byte.out", _BYTE
    else:
        operator, ends = "quantized_decomposed::embedding_4bit.out", _NIBBLE
    scales = method.constant(held[1])
    return method.made(operator, found, scales, None, *ends, tokens, shape=shape)
