"""Which tensors `model.pte` holds, where, and of which weights each is made.

XNNPACK's schema in ExecuTorch takes, for a matrix of N rows and K columns: int8 codes (N, K) and
float32 scales (N,); or 4-bit codes raised by 8, the even one in the low half of a byte, and
bfloat16 scales (N, K / 32). The kernels that look embeddings up take the same int8 codes and
scales, so that a tied table lies in the file once; of 4 bits they take the even code in the high
half, and float32 scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...architectures import DecoderConfig, Kind
from ...errors import Unsupported
from ...quantize.palette import PaletteGrid
from ...quantize.plan import Choice, Plan
from ..container import Deployment
from ..layout import Layout, Matrix, Stored
from .embedding import LOOKUPS, matrix_of_bytes, table

MODEL, WEIGHTS = "model.pte", "base_weights.ptd"  # a program; the tensors of several
LINEARS = ("int4-g32", "int8-row")
_CURE = "write GGUF: --container gguf"
BFLOAT16 = "<u2"  # the upper half of a float32
ROPE, NUMBER, POSITIONS = "rope.", "number.", "positions"  # tensors that are no weights
HIDDEN = 1e9  # taken off a score for each position that it is too early or too late
# gelu's approximation is x / 2 * (1 + tanh(GELU_BEND * (x + GELU_CUBE * x ** 3)))
GELU_CUBE, GELU_BEND = 0.044715, math.sqrt(2 / math.pi)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where everything lies.

    Attributes:
        layout: all tensors; its matrices are those that are multiplied.
        looked_up: the embedding for the kernel: codes and scale, or values.
        tables: cosines and sines of each rope.
        positions: 0, 1 ... of the context, where a mask is computed.
        numbers: what the graphs add or multiply by.
        constants: what methods read: the first tensors of the file.
    """

    layout: Layout
    looked_up: tuple[Stored, ...]
    tables: tuple[tuple[Stored, Stored], ...]
    positions: Stored | None
    numbers: Mapping[float, Stored]
    constants: tuple[Stored, ...]


def layout(config: DecoderConfig, plan: Plan, deployment: Deployment) -> Placed:
    """Where everything lies.

    Raises:
        Unsupported: a grid that neither XNNPACK nor a kernel holds exactly.
    """
    named = {choice.weight.name: choice for choice in plan.choices}
    multiplied = []
    for choice in plan.choices:
        weight = choice.weight
        if not weight.is_matrix:
            continue
        if weight.kind is Kind.EMBEDDING:
            refuse_grid(choice, LOOKUPS, "ExecuTorch cannot look up", _CURE)
        if weight.kind is not Kind.EMBEDDING or config.tied:
            refuse_grid(choice, LINEARS, "ExecuTorch cannot multiply", _CURE)
            stem = weight.name.removesuffix(".weight")
            bias = named.get(f"{stem}.bias")
            multiplied.append(Matrix(stem, (choice,), (bias,) if bias else ()))
    (embedding,) = (c for c in plan.choices if c.weight.kind is Kind.EMBEDDING)
    looked_up = list(table(embedding))
    masked = masks(config, deployment.context)
    tables = [
        Stored(f"{ROPE}{index}.{half}", "<f4", shape, (), "values")
        for index, rope in enumerate(config.ropes)
        for shape in [(deployment.context, 1, rope.rotated(config.head_dim) // 2)]
        for half in ("cos", "sin")
    ]
    vectors = [
        Stored(choice.weight.name, "<f4", choice.weight.shape, (choice,), "values")
        for choice in plan.choices
        if choice.weight.is_norm
    ]
    numbers = {
        number: Stored(f"{NUMBER}{number!r}", "<f4", (1,), (), "values")
        for number in _numbers(config, masked)
    }
    positions = [Stored(POSITIONS, "<f4", (deployment.context, 1), (), "values")] if masked else []
    constants = [*looked_up, *tables, *positions, *vectors, *numbers.values()]
    stored = {tensor.name: tensor for tensor in constants}
    for matrix in multiplied:
        stored |= {tensor.name: tensor for tensor in tensors_of(matrix)}
        stored |= {
            bias.weight.name: Stored(bias.weight.name, "<f4", bias.weight.shape, (bias,), "values")
            for bias in matrix.bias
        }
    found = Layout(multiplied, stored.values())
    by_name = found.by_name
    pairs = [by_name[each.name] for each in tables]
    return Placed(
        found,
        tuple(by_name[tensor.name] for tensor in looked_up),
        tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        by_name.get(POSITIONS),
        {number: by_name[tensor.name] for number, tensor in numbers.items()},
        found.tensors[: len(constants)],
    )


def masks(config: DecoderConfig, context: int) -> dict[int, int]:
    """{layer: tokens that it sees} of the layers that ExecuTorch's attention needs a mask for."""
    found = {}
    for layer in range(config.layers):
        window = config.attention(layer).window
        if (window is not None and window < context) or config.attention_softcap is not None:
            found[layer] = min(window or context, context)
    return found


def _numbers(config: DecoderConfig, masked: Mapping[int, int]) -> list[float]:
    """What is added, or multiplied by where that changes anything."""
    factors = (config.embedding_multiplier, config.residual_multiplier, 1 / config.logits_divisor)
    found = [config.rms_norm_eps, *(factor for factor in factors if factor != 1)]
    if config.family.norm_offset:
        found.append(config.family.norm_offset)
    if config.logits_softcap is not None:
        found += [config.logits_softcap, 1 / config.logits_softcap]
    if config.attention_softcap is not None:
        cap = config.attention_softcap
        found += [cap, config.attention_scale / cap]
    if masked:
        found += [0.0, HIDDEN, *(seen - 1 for seen in masked.values())]
    if config.family.activation != "silu":
        found += [1.0, GELU_CUBE, GELU_BEND, 0.5]
    return sorted({float(number) for number in found})


def tensors_of(matrix: Matrix) -> Iterator[Stored]:
    """What a matrix that is multiplied needs in the file, its bias left out."""
    grid, (rows, columns) = matrix.grid, matrix.shape
    if grid is None:
        yield Stored(f"{matrix.name}.weight", "<f4", (rows, columns), matrix.choices, "values")
    elif grid.group is None:
        yield from matrix_of_bytes(matrix.name, matrix.choices[0], grid)
    else:
        packed = (rows, columns // 2)
        yield Stored(f"{matrix.name}.codes", "|u1", packed, matrix.choices, "codes")
        scales = (rows, grid.groups(columns))
        yield Stored(f"{matrix.name}.scale", BFLOAT16, scales, matrix.choices, "scale")


def refuse_grid(choice: Choice, held: tuple[str, ...], what: str, cure: str) -> None:
    """Raise Unsupported for a grid that is not `held`; `what` cannot be done with it.

    `cure` is what other container may hold it; none of them holds a palettized grid.
    """
    if choice.grid is None or choice.grid.name in held:
        return
    name, grid = choice.weight.name, choice.grid.name
    elsewhere = "" if isinstance(choice.grid, PaletteGrid) else f", or {cure}"
    raise Unsupported(
        f"{name}: {what} the grid {grid}",
        f"it holds {', '.join(held)} exactly there; other grids lower to wrong numbers or fail when"
        " they are loaded",
        f'give it one of these, such as "{name}" = "int8-row"{elsewhere}',
    )
