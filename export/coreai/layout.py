"""Which constants `main.mlirb` holds under names of ours, and of which weights each is made.

`coreai.blockwise_shift_scale` makes (codes - offset) * scale in the type of the scale, so a scale
is float16 only where the product is exact in float16: 8 significant bits times a code of 4 bits.
`coreai.lut_to_dense` looks up levels. All arithmetic is float32, and so are float weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.grid import GRIDS, Grid
from ...quantize.palette import PaletteGrid
from ...quantize.plan import Choice, Plan
from ..layout import INT4, UINT2, UINT4, Layout, Stored

LEVELS, ROPE, PLACES = "levels.", "rope.", "places"
# Those that were run in Apple's runtime. Of others the compiler computes constants: a norm plus 1.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")


class Form(NamedTuple):
    """How a grid is held.

    Attributes:
        codes: the type of its codes.
        scale: the type of its scales.
        offset: what is subtracted from a stored code.
        looked_up: whether codes are places in a table of float32 levels.
    """

    codes: str
    scale: str
    offset: int = 0
    looked_up: bool = False


FORMS = {
    "int4-g32": Form(INT4, "<f2"),
    "int4-g32-signed": Form(INT4, "<f2"),
    "int8-row": Form("|i1", "<f4"),
    "int2-g64": Form(UINT2, "<f2", offset=1),
    "nf4-g64": Form(UINT4, "<f4", looked_up=True),
}


def layout(config: DecoderConfig, plan: Plan, context: int) -> Layout:
    """Every constant, in the order of the weights.

    Raises:
        Unsupported: a family or a grid that was not proven in Apple's runtime, or a reward model.
    """
    _refuse_config(config)
    tensors = [tensor for choice in plan.choices for tensor in _tensors(choice)]
    for name in sorted({c.grid.name for c in plan.choices if c.grid is not None}):
        if FORMS[name].looked_up:
            levels = GRIDS[name].levels
            assert levels is not None, "FORMS says that it has them"
            shape = (1, 1, len(levels), 1)
            tensors.append(Stored(f"{LEVELS}{name}", "<f4", shape, (), "values"))
    for index, attention in enumerate(config.attentions):
        if attention.rope is not None:
            table = (2, context, attention.rope.rotated(config.head_dim))
            tensors.append(Stored(f"{ROPE}{index}", "<f4", table, (), "values"))
    tensors.append(Stored(PLACES, "<i4", (context,), (), "values"))
    return Layout([], tensors)


def form_of(choice: Choice) -> Form:
    """How a quantized weight is held."""
    assert choice.grid is not None, "asked of quantized weights"
    return FORMS[choice.grid.name]


def _tensors(choice: Choice) -> Iterator[Stored]:
    weight, grid = choice.weight, choice.grid
    if grid is None:
        yield Stored(weight.name, "<f4", weight.shape, (choice,), "values")
        return
    if grid.name not in FORMS:
        palette = isinstance(grid, PaletteGrid)
        raise Unsupported(
            f"{weight.name}: Core AI cannot hold the grid {grid.name}",
            f"exact there and proven are {', '.join(FORMS)}",
            f'give it one of these, such as "{weight.name}" = "int8-row"'
            + ("" if palette else ", or write another container: --container coreml"),
        )
    assert isinstance(grid, Grid), "FORMS has no others"
    (rows, columns), form, stem = weight.shape, form_of(choice), weight.name
    stem = stem.removesuffix(".weight")
    yield Stored(f"{stem}.codes", form.codes, (rows, columns), (choice,), "codes")
    groups = (rows, grid.groups(columns))
    shape = (*groups, 1) if form.looked_up else groups  # a reshape of a constant would be computed
    yield Stored(f"{stem}.scale", form.scale, shape, (choice,), "scale")


def _refuse_config(config: DecoderConfig) -> None:
    family = config.family.model_type
    if config.reward or family not in FAMILIES:
        what = "reward models" if config.reward else f"the family {family}"
        raise Unsupported(
            f"{what} cannot go to Core AI yet",
            f"only decoders of {', '.join(FAMILIES)} were run in Apple's runtime",
            "write Core ML: --target ios",
        )
