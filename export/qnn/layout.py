"""What the container refuses, and where the codes lie in `qdq/model.data`.

DequantizeLinear (onnx/Operators.md) takes a matrix of N rows and K columns as (K, N): int8 codes
with a scale for each of the N columns (axis 1), or int4 codes, the even one in the low half of a
byte, with scales (K / 32, N) (axis 0, block_size 32).
"""

from __future__ import annotations

from collections.abc import Iterator

from ...architectures import DecoderConfig, Kind
from ...errors import Unsupported
from ...quantize.grid import Grid
from ...quantize.palette import PaletteGrid
from ...quantize.plan import Choice, Plan
from ..layout import INT4, Layout, Matrix, Stored

GRIDS = ("int8-row", "int4-g32", "int4-g32-signed")
_BIAS = 64  # numbers in the narrowest bias
CHUNK = 64  # prompt tokens of one run


def layout(config: DecoderConfig, plan: Plan) -> Layout:
    """Every matrix that is multiplied, in the order of the forward pass, and its tensors.

    Raises:
        Unsupported: a grid or a bias that the NPU does not hold.
    """
    named = {choice.weight.name: choice for choice in plan.choices}
    for choice in plan.choices:
        if choice.weight.is_matrix:
            _refuse_grid(choice)
        elif choice.weight.name.endswith(".bias"):
            _refuse_bias(choice, plan)
    matrices = [
        _matrix(choice, named)
        for choice in plan.choices
        if choice.weight.is_matrix and (choice.weight.kind is not Kind.EMBEDDING or config.tied)
    ]
    return Layout(matrices, (tensor for matrix in matrices for tensor in _tensors(matrix)))


def head(config: DecoderConfig, placed: Layout) -> Matrix:
    """What makes logits: the head, or the embedding that it is tied to."""
    return placed.matrices[None, Kind.EMBEDDING if config.tied else Kind.HEAD]


def chunk_of(context: int) -> int:
    """Prompt tokens of one run, for a cache of `context` tokens."""
    return min(CHUNK, context)


def _refuse_grid(choice: Choice) -> None:
    if choice.grid is not None and choice.grid.name in GRIDS:
        return
    name = choice.weight.name
    elsewhere = ", or write GGUF: --container gguf --target android"
    found = "float16" if choice.grid is None else choice.grid.name
    raise Unsupported(
        f"{name}: the NPU cannot hold {found}",
        f"it multiplies {', '.join(GRIDS)} exactly; {choice.reason or 'nothing else was tested'}",
        f'give it one of these grids, such as "{name}" = "int8-row"'
        + ("" if isinstance(choice.grid, PaletteGrid) else elsewhere),
    )


def _refuse_bias(bias: Choice, plan: Plan) -> None:
    """Raise Unsupported for one that leaves bytes of the compiler's own memory in the binary.

    They stand in the padding of constants that are added by themselves; in a graph of int8-row
    alone a bias is a part of its product.
    """
    (width,) = bias.weight.shape
    blocks = [c for c in plan.choices if c.grid is not None and c.grid.name != "int8-row"]
    if width >= _BIAS and not blocks:
        return
    beside = f"beside {blocks[0].grid.name}" if blocks and blocks[0].grid else "by itself"
    raise Unsupported(
        f"{bias.weight.name}: a bias of {width} numbers {beside} is not held for the NPU",
        f"Qualcomm's compiler would make no two exports the same; it does with {_BIAS} numbers or"
        " more and int8-row everywhere",
        "give --preset int8, or write GGUF: --container gguf --target android",
    )


def _matrix(choice: Choice, named: dict[str, Choice]) -> Matrix:
    stem = choice.weight.name.removesuffix(".weight")
    bias = named.get(f"{stem}.bias")
    return Matrix(stem, (choice,), (bias,) if bias else ())


def _tensors(matrix: Matrix) -> Iterator[Stored]:
    grid, (rows, columns) = matrix.grid, matrix.shape
    assert isinstance(grid, Grid), "_refuse_grid lets no other pass"
    dtype = INT4 if grid.bits == 4 else "|i1"
    scale = (rows,) if grid.group is None else (columns // grid.group, rows)
    yield Stored(f"{matrix.name}.codes", dtype, (columns, rows), matrix.choices, "codes")
    yield Stored(f"{matrix.name}.scale", "<f4", scale, matrix.choices, "scale")
