"""The embedding of a program: looked up by a kernel on the CPU, whatever computes the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...quantize.grid import Grid
from ...quantize.plan import Choice
from ..layout import Stored
from .program import Method
from .subgraph import TOKENS, Tensor

LOOKUPS = ("int4-g32", "int8-row", "int8-g32", "int2-g64")
LOOKUP = ".lookup"  # tensors of a table that only the kernel reads
ZERO = -1.0  # of a grid of 2 bits: the kernel reads -2 to 1
_KERNELS = {  # bits of a code: operator, and the ends that it is told
    8: ("quantized_decomposed::embedding_byte.out", -128, 127),
    4: ("quantized_decomposed::embedding_4bit.out", -8, 7),
    2: ("quantized_decomposed::embedding_2bit.out", -2, 1),
}


def table(embedding: Choice) -> Iterator[Stored]:
    """What the kernel that looks rows up reads: codes, scale and zero points; or values."""
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
    packed, scales = (rows, columns * grid.bits // 8), (rows, grid.groups(columns))
    yield Stored(f"{stem}{LOOKUP}.codes", "|u1", packed, (embedding,), "codes")
    yield Stored(f"{stem}{LOOKUP}.scale", "<f4", scales, (embedding,), "scale")
    if grid.bits == 2:
        yield Stored(f"{stem}{LOOKUP}.zero", "<f4", scales, (embedding,), "zero_point")


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
    grid = held[0].choices[0].grid
    assert isinstance(grid, Grid), "layout refuses ggml's blocks"
    operator, *ends = _KERNELS[grid.bits]
    scales, *zeros = (method.constant(tensor) for tensor in held[1:])
    zero = zeros[0] if zeros else None
    return method.made(operator, found, scales, zero, *ends, tokens, shape=shape)
