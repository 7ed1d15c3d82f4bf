"""What the packages for the Neural Engine hold, and the sizes that it takes.

Facts and their sources are in docs/coreml.md. The Neural Engine computes in float16 alone, so norms
and tables of ropes are float16 too; a weight has one scale for each row, or one look-up table for
some rows. States have four dimensions, all but the first powers of two. A package above the limit
falls to the GPU without a word, so a larger model is several packages, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ...architectures import DecoderConfig, Kind
from ...errors import Unsupported
from ...quantize.plan import Choice, Plan
from ..container import Deployment
from ..coreml.adapter import Factor
from ..coreml.layout import HEAD, RECORD, matrices_of, refuse_grid, ropes_of, tensors_of
from ..coreml.package import package_name
from ..layout import Layout, Matrix, Stored

GRIDS = ("lut3-r16", "lut4-r16", "lut6-r16", "int8-row")
CHUNK = 64  # tokens of a prompt that are computed at a time
LIMIT = 900_000_000  # bytes of a package
LONGEST = 16_384  # of a dimension
_SMALLEST = 32  # of a state's last dimensions
_TAKES = "it takes one scale for each row, or a look-up table for some rows"
_INSTEAD = "write it for the GPU: --target ios18-gpu"
_PRESETS = f"choose --preset lut4, lut6 or int8, or {_INSTEAD}"


@dataclass(frozen=True, slots=True)
class Part:
    """A package: some layers of the decoder.

    Attributes:
        name: of the package.
        layers: which.
        first, last: whether it looks ids up, and whether it gives logits.
        layout: of its weights.
    """

    name: str
    layers: range
    first: bool
    last: bool
    layout: Layout


def parts(
    config: DecoderConfig,
    plan: Plan,
    deployment: Deployment,
    factors: Iterable[Factor] = (),
    limit: int = LIMIT,
) -> list[Part]:
    """The packages, in the order in which they run.

    Args:
        factors: of separate adapters; they do not count for the limit.
        limit: bytes of a package.

    Raises:
        Unsupported: a grid or a family that the Neural Engine does not compute exactly.
    """
    _refuse(config, plan)
    groups, held = _groups(config, plan, limit), list(factors)
    return [
        Part(
            package_name(place),
            layers,
            place == 0,
            place == len(groups) - 1,
            _layout(config, plan, deployment, held, layers, place == 0, place == len(groups) - 1),
        )
        for place, layers in enumerate(groups)
    ]


def room_of(context: int) -> int:
    """Positions of a state for `context` tokens."""
    return power_of_two(max(context, CHUNK))


def power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def state_of(config: DecoderConfig, part: Part, context: int) -> tuple[int, int, int, int]:
    """Shape of the keys and values of a package: those of layer n are at 2n and 2n + 1."""
    size = power_of_two(max(config.head_dim, _SMALLEST))
    return 2 * len(part.layers), power_of_two(config.kv_heads), room_of(context), size


def _refuse(config: DecoderConfig, plan: Plan) -> None:
    if config.family.scaled_embedding or config.attention_softcap is not None:
        raise Unsupported(
            f"the Neural Engine cannot compute {config.family.model_type}",
            "its residual stream grows beyond float16, and there is no other type",
            _INSTEAD,
        )
    if not np.float16(config.rms_norm_eps):
        raise Unsupported(
            f"the Neural Engine cannot add {config.rms_norm_eps:g} to the mean of a norm",
            "float16 has no number that is so small, and there is no other type",
            _INSTEAD,
        )
    for choice in plan.choices:
        refuse_grid(choice, GRIDS, "the Neural Engine cannot multiply", _TAKES, _PRESETS)


def _groups(config: DecoderConfig, plan: Plan, limit: int) -> list[range]:
    """Consecutive layers whose weights stay below the limit together.

    Of several packages the last one has a tied table too.
    """
    sizes, table = dict[int | None, int](), 0
    ends = {Kind.EMBEDDING: 0, Kind.HEAD: config.layers - 1, Kind.FINAL_NORM: config.layers - 1}
    for choice in plan.choices:
        layer = choice.weight.layer
        place = ends[choice.weight.kind] if layer is None else layer
        stored = sum(RECORD + tensor.nbytes for tensor in tensors_of(choice, "<f2"))
        sizes[place] = sizes.get(place, 0) + stored
        table = stored if choice.weight.kind is Kind.EMBEDDING else table
    if config.tied and sum(sizes.values()) > limit:
        sizes[config.layers - 1] += table
    found, start, held = list[range](), 0, 0
    for layer in range(config.layers):
        if held and held + sizes[layer] > limit:
            found.append(range(start, layer))
            start, held = layer, 0
        held += sizes[layer]
    return [*found, range(start, config.layers)]


def _layout(
    config: DecoderConfig,
    plan: Plan,
    deployment: Deployment,
    factors: Iterable[Factor],
    layers: range,
    first: bool,
    last: bool,
) -> Layout:
    def held(choice: Choice) -> bool:
        weight = choice.weight
        if weight.layer is not None:
            return weight.layer in layers
        if weight.kind is Kind.EMBEDDING:
            return first or (last and config.tied)
        return last

    def matrices() -> Iterator[Matrix]:
        return (matrix for matrix in matrices_of(plan) if held(matrix.choices[0]))

    tensors: list[Stored] = []
    for choice in plan.choices:
        if held(choice):
            tensors += tensors_of(choice, "<f2")
    tensors += ropes_of(config, room_of(deployment.context), "<f2")
    tensors += [factor.stored for factor in factors if factor.layer in layers]
    return Layout(matrices(), tensors, HEAD, RECORD)
