"""The building blocks of a decoder as ONNX operators, each a function from values to a value.

Operators of the domain `com.microsoft` are those of onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..layout import Matrix, Stored
from .graph import CONTRIB, Graph
from .layout import CODEBOOKS, FLOAT16, FLOAT32, Float, GraphLayout, block_of, has_zero_points

# 4: onnxruntime multiplies int8 activations, as fast as a phone can; 1: float32, exact.
SHIPPED_LEVEL = 4


def linear(graph: Graph, x: ir.Value, matrix: Matrix, layout: GraphLayout) -> ir.Value:
    """x @ weight.T + bias, (..., rows); all of the layout's activations type."""
    rows, columns = matrix.shape
    if matrix.grid is None:
        weight = stored(graph, f"{matrix.name}.weight", layout, layout.activations)
        (y,) = graph.op(
            "FusedMatMul", x, weight, name=matrix.name, domain=CONTRIB, transA=0, transB=1
        )
    elif matrix.grid.levels is not None:
        (y,) = graph.op(
            "MatMulBnb4",
            x,
            graph.stored(layout.by_name[f"{matrix.name}.codes"]),
            graph.stored(layout.by_name[f"{matrix.name}.scale"]),
            name=matrix.name,
            domain=CONTRIB,
            K=columns,
            N=rows,
            block_size=matrix.grid.group,
            quant_type=CODEBOOKS[matrix.grid.name],
        )
    else:
        (y,) = graph.op(
            "MatMulNBits",
            x,
            graph.stored(layout.by_name[f"{matrix.name}.codes"]),
            *_scales(graph, matrix, layout, layout.activations),
            name=matrix.name,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=matrix.grid.bits,
            block_size=block_of(matrix.grid, columns),
            accuracy_level=SHIPPED_LEVEL,
        )
    if matrix.bias:
        bias = stored(graph, f"{matrix.name}.bias", layout, layout.activations)
        (y,) = graph.op("Add", y, bias, name=f"{matrix.name}.bias")
    return y


def low_rank(
    graph: Graph,
    x: ir.Value,
    y: ir.Value,
    matrix: Matrix,
    names: tuple[str, str],
    dtype: Float,
) -> ir.Value:
    """y + x @ a @ b, with factors a (columns, rank) and b (rank, rows) that a run may give."""
    rows, columns = matrix.shape
    rank = f"{matrix.name}.rank"
    a = graph.optional(names[0], np.zeros((columns, 0), dtype), [columns, rank])
    b = graph.optional(names[1], np.zeros((0, rows), dtype), [rank, rows])
    (inner,) = graph.op("MatMul", x, a, name=names[0])
    (update,) = graph.op("MatMul", inner, b, name=names[1])
    return add(graph, y, update, f"{matrix.name}.adapted")


def lookup(graph: Graph, ids: ir.Value, matrix: Matrix, layout: GraphLayout) -> ir.Value:
    """Rows of a table as they enter the stream, (..., columns): `linear`'s stored tensors."""
    rows, columns = matrix.shape
    if matrix.grid is None:
        place = layout.by_name[f"{matrix.name}.weight"]
        (found,) = graph.op("Gather", graph.stored(place), ids, name=f"{matrix.name}.rows", axis=0)
        return graph.cast(found, float_of(place), layout.stream, f"{matrix.name}.rows")
    block = block_of(matrix.grid, columns)
    # The bytes of `linear`'s codes under another shape: onnxruntime would copy a reshaped tensor.
    codes = layout.by_name[f"{matrix.name}.codes"]
    flat = replace(codes, name=f"{codes.name}.rows", shape=(rows, codes.nbytes // rows))
    (found,) = graph.op(
        "GatherBlockQuantized",
        *(graph.stored(flat), ids, *_scales(graph, matrix, layout, layout.stream)),
        name=f"{matrix.name}.rows",
        domain=CONTRIB,
        bits=matrix.grid.bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    if columns % block:  # the last block of a row is filled up
        zero, end, last = graph.integers(0), graph.integers(columns), graph.integers(-1)
        (found,) = graph.op("Slice", found, zero, end, last, name=f"{matrix.name}.rows.cut")
    return found


def rms_norm(graph: Graph, x: ir.Value, weight: ir.Value, epsilon: float, name: str) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension."""
    (y,) = graph.op(
        "SimplifiedLayerNormalization", x, weight, name=name, axis=-1, epsilon=epsilon, stash_type=1
    )
    return y


def add_and_norm(
    graph: Graph, x: ir.Value, added: ir.Value, weight: ir.Value, epsilon: float, name: str
) -> tuple[ir.Value, ir.Value]:
    """(x + added, its rms_norm) in one operator."""
    normed, _, _, total = graph.op(
        "SkipSimplifiedLayerNormalization",
        *(x, added, weight),
        name=name,
        domain=CONTRIB,
        outputs=4,
        epsilon=epsilon,
    )
    return total, normed


def add(graph: Graph, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
    return graph.op("Add", x, y, name=name)[0]


def scaled(graph: Graph, x: ir.Value, factor: float, name: str, dtype: Float) -> ir.Value:
    """x * factor, for an x of this type; nothing is computed for 1."""
    return x if factor == 1 else graph.op("Mul", x, graph.real(factor, dtype), name=name)[0]


def capped(graph: Graph, x: ir.Value, cap: float | None, name: str, dtype: Float) -> ir.Value:
    """cap * tanh(x / cap), for an x of this type."""
    if cap is None:
        return x
    (y,) = graph.op("Div", x, graph.real(cap, dtype), name=f"{name}.div")
    (y,) = graph.op("Tanh", y, name=f"{name}.tanh")
    return graph.op("Mul", y, graph.real(cap, dtype), name=name)[0]


def silu(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    (gate,) = graph.op("Sigmoid", x, name=f"{name}.sigmoid")
    return graph.op("Mul", x, gate, name=name)[0]


def gelu_tanh(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    return graph.op("Gelu", x, name=name, approximate="tanh")[0]


def reshaped(graph: Graph, x: ir.Value, sizes: tuple[int, ...], name: str) -> ir.Value:
    """(batch, length, width) or (batch, length, heads, size) as (batch, length, *sizes)."""
    return graph.op("Reshape", x, graph.integers(0, 0, *sizes), name=name)[0]


def halves(graph: Graph, x: ir.Value, name: str) -> tuple[ir.Value, ...]:
    """Both halves of the last dimension."""
    return graph.op("Split", x, name=name, outputs=2, axis=-1, num_outputs=2)


def last_place(graph: Graph, ids: ir.Value, mask: ir.Value, pad: int | None, name: str) -> ir.Value:
    """int64 (batch, 1): where each row has its last token that is neither masked nor `pad`.

    The first place of a row without such a token, as in transformers.
    """
    if pad is not None:
        (padding,) = graph.op("Equal", ids, graph.integers(pad), name=f"{name}.padding")
        (kept,) = graph.op("Not", padding, name=f"{name}.kept")
        (kept,) = graph.op("Cast", kept, name=f"{name}.kept.int64", to=int(ir.DataType.INT64))
        (mask,) = graph.op("Mul", mask, kept, name=f"{name}.mask")
    (length,) = graph.op("Shape", ids, name=f"{name}.shape", start=1, end=2)
    (length,) = graph.op("Squeeze", length, name=f"{name}.length")
    step, zero = (graph.constant(np.array(n, np.int64), f"int64[]:{n}") for n in (1, 0))
    (places,) = graph.op("Range", zero, length, step, name=f"{name}.places")
    (places,) = graph.op("Mul", places, mask, name=f"{name}.masked")
    # of int32: onnxruntime has no ArgMax of int64
    (places,) = graph.op("Cast", places, name=f"{name}.int32", to=int(ir.DataType.INT32))
    return graph.op("ArgMax", places, name=name, axis=1, keepdims=1)[0]


def stored(graph: Graph, name: str, layout: GraphLayout, dtype: Float) -> ir.Value:
    """A stored tensor as `dtype`: onnxruntime folds the cast when it loads the model."""
    place = layout.by_name[name]
    return graph.cast(graph.stored(place), float_of(place), dtype, name)


def float_of(tensor: Stored) -> Float:
    """The type of a stored tensor of floats."""
    return FLOAT16 if tensor.dtype == FLOAT16 else FLOAT32


def _scales(graph: Graph, matrix: Matrix, layout: GraphLayout, dtype: Float) -> list[ir.Value]:
    """Scales as `dtype`, and zero points where they are stored."""
    assert matrix.grid is not None
    values = [stored(graph, f"{matrix.name}.scale", layout, dtype)]
    if has_zero_points(matrix.grid):
        values.append(graph.stored(layout.by_name[f"{matrix.name}.zero_point"]))
    return values
