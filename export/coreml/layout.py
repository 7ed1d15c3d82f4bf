"""Which tensors `weight.bin` holds, where, and of which weights each is made.

Everything follows from shapes, so that the size of the package is known before any work is done.

A package decompresses constants (coremltools' iOS 18 `constexpr` operations): for a matrix of N
rows and K columns, codes (N, K), less zero points (N, K / group) where a grid has them, times
scales (N, K / group); or indices (N, K) into the levels of a
look-up table, which from iOS 26 on may be multiplied by such scales too. A tied table lies in the
file once and is read by the look-up and by the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.grid import LINEAR, Grid, listed
from ...quantize.palette import LEVEL_DTYPE, PaletteGrid
from ...quantize.plan import Choice, Plan
from ..container import Deployment
from ..layout import INT4, UINT2, UINT3, UINT4, UINT6, Layout, Matrix, Stored

Float = Literal["<f2", "<f4"]
HEAD = RECORD = 64  # bytes before the first tensor, and before each
_TAKES = "it multiplies codes by scales, or looks them up"
_INSTEAD = "choose one of these, such as --preset int4, or write GGUF: --container gguf"
ROPE, ZEROS, LEVELS = "rope.", "zeros.", "levels."


class Form(NamedTuple):
    """How a grid is held.

    Attributes:
        codes: the type of its codes.
        scale: the type of its scales; None: it is a palette, and has none.
        levels: the type of its look-up table; None: codes stand for themselves.
        zero_point: the type of its zero points; None: it has none.
    """

    codes: str
    scale: str | None
    levels: str | None = None
    zero_point: str | None = None


_LINEAR = {
    "int4": Form(INT4, "<f2"),
    "uint4": Form(UINT4, "<f2", zero_point=UINT4),
    "int8": Form("|i1", "<f2"),
}
FORMS = {
    **{name: _LINEAR[name.partition("-")[0]] for name in LINEAR},
    "int4-g32-signed": Form(INT4, "<f2"),
    "int2-g64": Form(UINT2, "<f2", "|i1"),
    "int2-g256": Form(UINT2, "<f2", "|i1"),
    "int3-g64": Form(UINT3, "<f2", "|i1"),
    "nf4-g64": Form(UINT4, "<f4", "<f4"),
    "fp4-g64": Form(UINT4, "<f4", "<f4"),
    "lut3-r16": Form(UINT3, None, "<f2"),
    "lut4-r16": Form(UINT4, None, "<f2"),
    "lut6-r16": Form(UINT6, None, "<f2"),
}


@dataclass(frozen=True, slots=True)
class Ios:
    """A release of iOS, and what packages for it are marked with.

    Attributes:
        version: such as 18.
        specification: specificationVersion of the model.
        opset: of its functions.
    """

    version: int
    specification: int
    opset: str


IOS18, IOS26 = Ios(18, 9, "CoreML8"), Ios(26, 10, "CoreML9")


def release_of(plan: Plan) -> Ios:
    """The oldest release that decompresses every grid of a plan."""
    return IOS26 if any(map(is_chain, plan.choices)) else IOS18


def is_chain(choice: Choice) -> bool:
    """Whether a weight is looked up in a table and then multiplied by scales."""
    return choice.grid is not None and None not in (form_of(choice).scale, form_of(choice).levels)


def form_of(choice: Choice) -> Form:
    """How a quantized weight is held."""
    assert choice.grid is not None, "asked of quantized weights"
    return FORMS[choice.grid.name]


def layout(
    config: DecoderConfig, plan: Plan, deployment: Deployment, factors: Iterable[Stored] = ()
) -> Layout:
    """Where everything lies.

    Args:
        factors: of separate adapters.

    Raises:
        Unsupported: a grid that no constexpr operation holds exactly.
    """
    for choice in plan.choices:
        refuse_grid(choice, tuple(FORMS), "Core ML cannot hold", _TAKES, _INSTEAD)
    matrices = list(matrices_of(plan))
    tensors = [tensor for choice in plan.choices for tensor in tensors_of(choice, "<f4")]
    shared = {tensor.name: tensor for matrix in matrices for tensor in _shared(matrix)}
    tensors += [shared[name] for name in sorted(shared)]
    tensors += ropes_of(config, deployment.context, "<f4")
    tensors += factors
    return Layout(matrices, tensors, HEAD, RECORD)


def ropes_of(config: DecoderConfig, length: int, dtype: Float) -> Iterator[Stored]:
    """Cosines and sines of the positions below `length`."""
    for index, rope in enumerate(config.ropes):
        shape = (1, 1, length, rope.rotated(config.head_dim) // 2)
        for half in ("cos", "sin"):
            yield Stored(f"{ROPE}{index}.{half}", dtype, shape, (), "values")


def matrices_of(plan: Plan) -> Iterator[Matrix]:
    named = {choice.weight.name: choice for choice in plan.choices}
    for choice in plan.choices:
        if choice.weight.is_matrix:
            stem = choice.weight.name.removesuffix(".weight")
            bias = named.get(f"{stem}.bias")
            yield Matrix(stem, (choice,), (bias,) if bias else ())


def tensors_of(choice: Choice, vectors: Float) -> Iterator[Stored]:
    """What a weight needs in the file; norms and biases are of the type `vectors`."""
    weight, grid = choice.weight, choice.grid
    stem = weight.name.removesuffix(".weight")
    if grid is None:
        dtype = "<f2" if weight.is_matrix else vectors
        yield Stored(weight.name, dtype, weight.shape, (choice,), "values")
        return
    (rows, columns), form = weight.shape, form_of(choice)
    yield Stored(f"{stem}.codes", form.codes, (rows, columns), (choice,), "codes")
    if isinstance(grid, PaletteGrid):
        levels = (rows // grid.group, 1, grid.size, 1)
        yield Stored(f"{stem}.levels", LEVEL_DTYPE, levels, (choice,), "levels")
        return
    assert isinstance(grid, Grid) and form.scale, "layout refuses ggml's blocks"
    shape = (rows, grid.groups(columns))
    yield Stored(f"{stem}.scale", form.scale, shape, (choice,), "scale")
    if form.zero_point:
        yield Stored(f"{stem}.zero_point", form.zero_point, shape, (choice,), "zero_point")


def zeros_of(matrix: Matrix) -> str:
    """The name of the bias that adds nothing to a product: one for each size and type."""
    choice = matrix.choices[0]
    kind = ("<f2" if choice.grid is None else form_of(choice).scale) or "<f2"
    return f"{ZEROS}{matrix.shape[0]}.{kind[1:]}"


def _shared(matrix: Matrix) -> Iterator[Stored]:
    """What matrices of one size or grid share: biases that add nothing, and levels."""
    name, grid = zeros_of(matrix), matrix.choices[0].grid
    yield Stored(name, f"<{name[-2:]}", (matrix.shape[0],), (), "values")
    if isinstance(grid, Grid) and grid.levels is not None:
        shape = (1, 1, len(grid.levels), 1)
        yield Stored(f"{LEVELS}{grid.name}", "<f4", shape, (), "values")


def refuse_grid(choice: Choice, held: Sequence[str], what: str, takes: str, instead: str) -> None:
    """Raise Unsupported for a weight on a grid that is not held.

    Args:
        what: such as "Core ML cannot hold".
        takes: what it does hold.
        instead: what to do.
    """
    if choice.grid is None or choice.grid.name in held:
        return
    raise Unsupported(
        f"{choice.weight.name}: {what} the grid {choice.grid.name}",
        f"{takes}; exact are {listed(held)}",
        instead,
    )
