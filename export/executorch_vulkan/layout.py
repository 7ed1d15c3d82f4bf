"""Which tensors `model.pte` holds for the GPU, where, and of which weights each is made.

Its operators take, for a matrix of N rows and K columns: int8 codes (N, K) and float32 scales (N,);
or 4-bit codes raised by 8, the even one in the low half of a byte, and float32 scales (K / 32, N).
A matrix that is too large for one product, or that several outputs share, is multiplied in parts:
rows of the same tensors under keys of their own, but for the scales of 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from ...architectures import DecoderConfig, Kind
from ...errors import Unsupported
from ...quantize.plan import Choice, Plan
from ..container import Deployment
from ..executorch.embedding import LOOKUPS, matrix_of_bytes, table
from ..executorch.layout import GELU_BEND, GELU_CUBE, LINEARS, NUMBER, ROPE, refuse_grid
from ..layout import Layout, Matrix, Stored
from . import limits

OFFSET = "offset."  # vectors of what is added to the weights of norms, by their size
_CURE = "write it for the CPU: --container executorch"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a matrix as one product takes them.

    Attributes:
        weight: codes, or float32 numbers.
        scale: None beside float32 numbers.
        bias: None where there is none.
        rows: how many.
        group: columns that share a scale; None: all of a row.
    """

    weight: Stored
    scale: Stored | None
    bias: Stored | None
    rows: int
    group: int | None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where everything lies.

    Attributes:
        layout: all tensors of the file.
        parts: what each product is made of; those of q, k, v, gate and up also where the model has
            them in one matrix.
        views: rows of tensors of the layout, under names of their own.
        looked_up: the embedding for the kernel: codes and scale, or values.
        tables: cosines and sines of each rope.
        numbers: what is added or multiplied by.
        offsets: what is added to the weights of norms, by their size.
        constants: what kernels on the CPU read: the first tensors of the file.
    """

    layout: Layout
    parts: Mapping[tuple[int | None, Kind], tuple[Part, ...]]
    views: tuple[Stored, ...]
    looked_up: tuple[Stored, ...]
    tables: tuple[tuple[Stored, Stored], ...]
    numbers: Mapping[float, Stored]
    offsets: Mapping[int, Stored]
    constants: tuple[Stored, ...]


def layout(config: DecoderConfig, plan: Plan, deployment: Deployment) -> Placed:
    """Where everything lies.

    Raises:
        Unsupported: a grid, a size or a family that the backend does not compute exactly.
    """
    _refuse(config, plan)
    matrices = list(_matrices(config, plan))
    (embedding,) = (c for c in plan.choices if c.weight.kind is Kind.EMBEDDING)
    looked_up = list(table(embedding))
    stored = {tensor.name: tensor for tensor in (*looked_up, *_tables(config, plan, deployment))}
    for matrix in matrices:
        stored |= {tensor.name: tensor for tensor in _tensors(config, matrix)}
    found = Layout(matrices, stored.values())
    held = found.by_name
    parts = {
        (matrix.layer, kind): tuple(_part(held, matrix, *rows) for rows in each)
        for matrix in matrices
        for kind, each in _products(config, matrix).items()
    }
    named = (
        tensor
        for each in parts.values()
        for part in each
        for tensor in (part.weight, part.scale, part.bias)
    )
    pairs = [held[name] for name in stored if name.startswith(ROPE)]
    sizes = (name for name in stored if name.startswith(OFFSET))
    numbers = (name for name in stored if name.startswith(NUMBER))
    return Placed(
        found,
        parts,
        tuple(tensor for tensor in named if tensor and tensor.name not in held),
        tuple(held[tensor.name] for tensor in looked_up),
        tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        {float(name.removeprefix(NUMBER)): held[name] for name in numbers},
        {held[name].shape[0]: held[name] for name in sizes},
        found.tensors[: len(looked_up)],
    )


def query_factor(config: DecoderConfig) -> float:
    """What queries are multiplied by: attention itself divides scores by sqrt(head_dim)."""
    factor = config.attention_scale * config.head_dim**0.5
    return 1.0 if abs(factor - 1) < _SAME else factor


_SAME = 1e-9


def _refuse(config: DecoderConfig, plan: Plan) -> None:
    if config.attention_softcap is not None:
        raise Unsupported(
            "ExecuTorch's Vulkan backend cannot cap the scores of attention",
            f"its attention has no cap, and {config.family.model_type} needs"
            f" {config.attention_softcap:g}",
            _CURE,
        )
    limits.refuse_sizes(config)
    for choice in plan.choices:
        weight = choice.weight
        if not weight.is_matrix:
            continue
        if weight.kind is Kind.EMBEDDING:
            refuse_grid(choice, LOOKUPS, "ExecuTorch cannot look up", _CURE)
        if weight.kind is not Kind.EMBEDDING or config.tied:
            what = "ExecuTorch's Vulkan backend cannot multiply"
            refuse_grid(choice, LINEARS, what, _CURE)
            limits.refuse_matrix(weight.name, (weight.shape[0], weight.shape[1]))


def _matrices(config: DecoderConfig, plan: Plan) -> Iterator[Matrix]:
    """Those that are multiplied, in the order of the forward pass."""
    named = {choice.weight.name: choice for choice in plan.choices}
    for choice in plan.choices:
        weight = choice.weight
        if weight.is_matrix and (weight.kind is not Kind.EMBEDDING or config.tied):
            stem = weight.name.removesuffix(".weight")
            bias = named.get(f"{stem}.bias")
            yield Matrix(stem, (choice,), (bias,) if bias else ())


def _tables(config: DecoderConfig, plan: Plan, deployment: Deployment) -> Iterator[Stored]:
    """Ropes, norms, and the numbers that the graph adds or multiplies by."""
    room = limits.room_of(deployment.context)
    for index, rope in enumerate(config.ropes):
        for half in ("cos", "sin"):
            shape = (room, rope.rotated(config.head_dim))
            yield Stored(f"{ROPE}{index}.{half}", "<f4", shape, (), "values")
    norms = [choice for choice in plan.choices if choice.weight.is_norm]
    for choice in norms:
        yield _vector(choice)
    if config.family.norm_offset:
        for size in sorted({choice.weight.shape[0] for choice in norms}):
            yield Stored(f"{OFFSET}{size}", "<f4", (size,), (), "values")
    for number in _numbers(config):
        yield Stored(f"{NUMBER}{number!r}", "<f4", (1,), (), "values")


def _numbers(config: DecoderConfig) -> list[float]:
    factors = (
        *(config.embedding_multiplier, config.residual_multiplier, query_factor(config)),
        1 / config.logits_divisor,
    )
    found = [factor for factor in factors if factor != 1]
    if config.logits_softcap is not None:
        found += [config.logits_softcap, 1 / config.logits_softcap]
    if config.family.activation != "silu":
        found += [1.0, GELU_CUBE, GELU_BEND, 0.5]
    return sorted({float(number) for number in found})


def _products(config: DecoderConfig, matrix: Matrix) -> dict[Kind, list[tuple[int, int]]]:
    """{what it makes: the rows of its parts}"""
    heads, groups = (count * config.head_dim for count in (config.heads, config.kv_heads))
    sizes = {
        Kind.QKV: {Kind.Q: heads, Kind.K: groups, Kind.V: groups},
        Kind.GATE_UP: dict.fromkeys((Kind.GATE, Kind.UP), config.intermediate_size),
    }.get(matrix.kind, {matrix.kind: matrix.shape[0]})
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    found = list(limits.ranges(matrix.shape, matrix.grid, ends.values()))
    return {
        kind: [rows for rows in found if end - sizes[kind] <= rows[0] < end]
        for kind, end in ends.items()
    }


def _tensors(config: DecoderConfig, matrix: Matrix) -> Iterator[Stored]:
    """What a matrix that is multiplied needs in the file."""
    grid, (rows, columns), choices = matrix.grid, matrix.shape, matrix.choices
    if grid is None:
        yield Stored(f"{matrix.name}.weight", "<f4", (rows, columns), choices, "values")
    elif grid.group is None:
        yield from matrix_of_bytes(matrix.name, choices[0], grid)
    else:
        yield Stored(f"{matrix.name}.codes", "|u1", (rows, columns // 2), choices, "codes")
        for each in _products(config, matrix).values():
            for start, stop in each:
                name = _name(f"{matrix.name}.scale", rows, start, stop)
                shape = (grid.groups(columns), stop - start)
                yield Stored(name, "<f4", shape, choices, "scale")
    for bias in matrix.bias:
        yield _vector(bias)


def _part(held: Mapping[str, Stored], matrix: Matrix, start: int, stop: int) -> Part:
    grid, rows = matrix.grid, matrix.shape[0]
    bias = held[matrix.bias[0].weight.name] if matrix.bias else None
    if grid is None:
        weight, scale, group = held[f"{matrix.name}.weight"], None, None
    elif grid.group is None:
        weight, group = held[f"{matrix.name}.codes"], None
        scale = _rows(held[f"{matrix.name}.scale"], start, stop)
    else:
        weight, group = held[f"{matrix.name}.codes"], grid.group
        scale = held[_name(f"{matrix.name}.scale", rows, start, stop)]
    return Part(
        _rows(weight, start, stop),
        scale,
        _rows(bias, start, stop) if bias else None,
        stop - start,
        group,
    )


def _rows(tensor: Stored, start: int, stop: int) -> Stored:
    """Some rows of a tensor; itself where that is all of them."""
    rows = tensor.shape[0]
    if (start, stop) == (0, rows):
        return tensor
    shape = (stop - start, *tensor.shape[1:])
    offset = tensor.offset + tensor.nbytes // rows * start
    return replace(tensor, name=_name(tensor.name, rows, start, stop), shape=shape, offset=offset)


def _name(tensor: str, rows: int, start: int, stop: int) -> str:
    return tensor if (start, stop) == (0, rows) else f"{tensor}[{start}:{stop}]"


def _vector(choice: Choice) -> Stored:
    return Stored(choice.weight.name, "<f4", choice.weight.shape, (choice,), "values")
