"""Which tensors `model.onnx.data` holds, where, and of which weights each is made.

Everything follows from shapes, so that the size of the files is known before any work is done.

MatMulNBits (onnxruntime's ContribOperators.md) takes, for a matrix of N rows and K columns in
blocks that share a scale: codes uint8 (N, blocks, bytes of a block), unsigned, low bits first;
scales (N, blocks); zero points uint8 (N, bytes), packed likewise, 2 ** (bits - 1) where there are
none. MatMulBnb4 takes NF4 and FP4 as bitsandbytes writes them: two codes to a byte, the first in
the high bits, and a float32 scale for each group, both without regard to rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from ...architectures import DecoderConfig, Kind
from ...errors import Unsupported
from ...quantize.blocks import BlockGrid
from ...quantize.grid import LINEAR, Grid, listed
from ...quantize.plan import Choice, Plan
from ..container import Deployment
from ..layout import Layout, Matrix, Stored

Float = Literal["<f4", "<f2"]
FLOAT32: Float = "<f4"
FLOAT16: Float = "<f2"
FLOAT_MATRIX, FLOAT_VECTOR, SCALE = "<f2", "<f4", "<f2"
CODEBOOKS = {"fp4-g64": 0, "nf4-g64": 1}  # quant_type of MatMulBnb4
GRIDS = (*LINEAR, "int4-g32-signed", "int2-g64", "int2-g256", *CODEBOOKS)
_QKV = (Kind.Q, Kind.K, Kind.V)
_BLOCKS = (16, 32, 64, 128, 256)


class GraphLayout(Layout):
    """A layout, and what the graph over it computes in.

    Attributes:
        activations: of products, attention, cache and logits.
        stream: of the residual stream and its norms.
    """

    def __init__(
        self,
        matrices: Iterable[Matrix],
        tensors: Iterable[Stored],
        activations: Float = FLOAT32,
        stream: Float = FLOAT32,
    ) -> None:
        super().__init__(matrices, tensors)
        self.activations, self.stream = activations, stream


def layout(
    config: DecoderConfig, plan: Plan, deployment: Deployment, activations: Float = FLOAT32
) -> GraphLayout:
    """Where everything lies; the tensors are the same whatever `activations` are.

    Raises:
        Unsupported: a grid that no operator of the graph holds exactly.
    """
    for choice in plan.choices:
        _refuse(choice, activations)
    matrices = list(_matrices(config, plan, deployment))
    first = {matrix.choices[0].weight.name: matrix for matrix in matrices}
    joined = {c.weight.name for matrix in matrices for c in (*matrix.choices, *matrix.bias)}
    tensors: list[Stored] = []
    for choice in plan.choices:
        weight = choice.weight
        if weight.name in first:
            tensors += _tensors(first[weight.name])
        elif weight.name not in joined:
            tensors.append(Stored(weight.name, FLOAT_VECTOR, weight.shape, (choice,), "values"))
    for index, rope in enumerate(config.ropes):
        shape = (deployment.context, rope.rotated(config.head_dim) // 2)
        for half in ("cos", "sin"):
            tensors.append(Stored(f"rope.{index}.{half}", FLOAT_VECTOR, shape, (), "values"))
    # Gemma multiplies embeddings by sqrt(hidden_size), and its stream grows beyond float16: genai's
    # builder, too, keeps it and its norms in float32.
    stream = FLOAT32 if config.family.scaled_embedding else activations
    return GraphLayout(matrices, tensors, activations, stream)


def block_of(grid: Grid, columns: int) -> int:
    """Weights that share a stored scale: the grid's group, or what costs least for a row's scale.

    That scale is repeated for each block, and the last block is filled up.
    """
    if grid.group is not None:
        return grid.group
    scale = np.dtype(SCALE).itemsize

    def row_bytes(block: int) -> int:
        return -(-columns // block) * (block * grid.bits // 8 + scale)

    return min(_BLOCKS, key=row_bytes)


def blocks_of(grid: Grid, columns: int) -> int:
    """Stored scales of one row."""
    return -(-columns // block_of(grid, columns))


def zero_point(grid: Grid) -> int:
    """What is added to every code of a grid that is not asymmetric before it is stored."""
    return -grid.low if grid.bits == 2 else 1 << (grid.bits - 1)


def has_zero_points(grid: Grid) -> bool:
    """Whether they are stored: where they are not what the operator takes without them."""
    return grid.asymmetric or zero_point(grid) != 1 << (grid.bits - 1)


def _matrices(config: DecoderConfig, plan: Plan, deployment: Deployment) -> Iterator[Matrix]:
    """In the order of the plan; q, k and v as one where nothing stands between them."""
    named = {choice.weight.name: choice for choice in plan.choices}

    def matrix(name: str, choices: tuple[Choice, ...]) -> Matrix:
        biases = (named.get(c.weight.name.removesuffix("weight") + "bias") for c in choices)
        return Matrix(name, choices, tuple(bias for bias in biases if bias is not None))

    apart = config.family.qk_norm is not None or bool(deployment.adapted & {*_QKV})
    for choice in plan.choices:
        weight = choice.weight
        if not weight.is_matrix:
            continue
        stem = weight.name.removesuffix(".weight")
        if weight.kind not in _QKV:
            yield matrix(stem, (choice,))
            continue
        root = stem.rpartition(".")[0]
        three = tuple(named[f"{root}.{letter}_proj.weight"] for letter in "qkv")
        if apart or len({one.grid for one in three}) > 1:
            yield matrix(stem, (choice,))
        elif weight.kind is Kind.Q:
            yield matrix(f"{root}.qkv_proj", three)


def _tensors(matrix: Matrix) -> Iterator[Stored]:
    """What a matrix needs in the file."""
    grid, (rows, columns) = matrix.grid, matrix.shape
    if grid is None:
        yield Stored(
            f"{matrix.name}.weight", FLOAT_MATRIX, (rows, columns), matrix.choices, "values"
        )
    elif grid.levels is not None:
        scales = rows * grid.groups(columns)
        yield Stored(f"{matrix.name}.codes", "|u1", (rows * columns // 2,), matrix.choices, "codes")
        yield Stored(f"{matrix.name}.scale", FLOAT_VECTOR, (scales,), matrix.choices, "scale")
    else:
        block, blocks = block_of(grid, columns), blocks_of(grid, columns)
        codes = (rows, blocks, block * grid.bits // 8)
        yield Stored(f"{matrix.name}.codes", "|u1", codes, matrix.choices, "codes")
        yield Stored(f"{matrix.name}.scale", SCALE, (rows, blocks), matrix.choices, "scale")
        if has_zero_points(grid):
            shape = (rows, -(-blocks * grid.bits // 8))
            yield Stored(f"{matrix.name}.zero_point", "|u1", shape, matrix.choices, "zero_point")
    if matrix.bias:
        yield Stored(f"{matrix.name}.bias", FLOAT_VECTOR, (rows,), matrix.bias, "values")


def _refuse(choice: Choice, activations: Float) -> None:
    if choice.grid is None:
        return
    # MatMulBnb4 takes scales of the type of its input, and these need not be exact in float16.
    cannot = choice.weight.kind is Kind.EMBEDDING or activations == FLOAT16
    held = [name for name in GRIDS if not (cannot and name in CODEBOOKS)]
    if choice.grid.name in held:
        return
    if choice.grid.name in GRIDS and choice.weight.kind is not Kind.EMBEDDING:
        raise Unsupported(
            f"{choice.weight.name}: a float16 graph cannot hold the grid {choice.grid.name}",
            "MatMulBnb4 takes scales of the type of its activations, and these are float32",
            "keep activations in float32: --container onnx",
        )
    elsewhere = ", or write GGUF: --container gguf" if isinstance(choice.grid, BlockGrid) else ""
    raise Unsupported(
        f"{choice.weight.name}: ONNX cannot hold the grid {choice.grid.name}",
        f"no operator of ONNX Runtime means the same; it holds {listed(held)} here exactly",
        f'give it one of these grids, such as "{choice.weight.name}" = "int8-g32"{elsewhere}',
    )
