"""Which weight gets which grid: presets for a whole model, patterns for single weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from types import MappingProxyType
from typing import Any

from ..architectures import DecoderConfig, Kind, Weight, weights
from ..errors import BadInput, UsageError
from .blocks import ANY_GRIDS, BLOCK_GRIDS, AnyGrid, BlockGrid
from .codes import CODES
from .ggml import NEEDS_IMPORTANCE, Type
from .grid import (
    GRIDS,
    INT2_G64,
    INT3_G64,
    INT4_G32,
    INT4_G32_SIGNED,
    INT8_ROW,
    NF4_G64,
    Grid,
    listed,
)
from .mixes import MIXES, held_type, wanted_type
from .palette import LUT3_R16, LUT4_R16, LUT6_R16, PALETTE_GRIDS, PaletteGrid

FLOAT = "float16"  # as a pattern's value: the weight stays float
# rtn-absmax: rtn without the search for a scale. imatrix: ggml's kernels with an importance matrix,
# tables without one, as llama-quantize does it; of a palettized grid k-means weighed by it. kmeans:
# of a palettized grid, without weights. auto: of those that can, in each layer the best.
METHODS = ("rtn", "rtn-absmax", "hqq", "gptq", "autoround", "imatrix", "kmeans", "auto")
CANDIDATES = ("rtn", "hqq", "gptq", "autoround", "imatrix")
BY_LAYERS = ("gptq", "autoround", "auto")  # these need how inputs vary together
_LEARNT = ("autoround", "auto")  # these measure on windows that are kept from the others
GIVEN = "given"  # as whoever quantized the checkpoint chose its codes; not a method to ask for
TRAINED = "qat"  # as `slimport qat` trained its codes; no plan is made with it
_INSTEAD = "instead of"
_NO_PATTERNS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Preset:
    """The grids of the matrices inside decoder layers and of embedding and head.

    `promoted`: the grid of the Linears that `_is_promoted` names; None: they are like the others.
    """

    linears: Grid | PaletteGrid
    tables: Grid
    promoted: Grid | None = None


PRESETS = {
    "int4": Preset(INT4_G32, INT8_ROW),
    "int4-all": Preset(INT4_G32, INT4_G32),
    "int4-signed": Preset(INT4_G32_SIGNED, INT8_ROW),
    "int8": Preset(INT8_ROW, INT8_ROW),
    "int2": Preset(INT2_G64, INT8_ROW),
    "nf4": Preset(NF4_G64, INT8_ROW),
    "int3": Preset(INT3_G64, INT8_ROW),
    "lut3": Preset(LUT3_R16, INT8_ROW),
    "lut4": Preset(LUT4_R16, INT8_ROW),
    "lut6": Preset(LUT6_R16, INT8_ROW),
    "mixed": Preset(INT4_G32, INT8_ROW, promoted=INT8_ROW),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one weight.

    Attributes:
        grid: None: the weight stays float (float16 in containers, float32 if it is 1-D).
        method: one of METHODS, GIVEN or TRAINED, or "" where grid is None.
        reason: where the choice comes from, for people.
    """

    weight: Weight
    grid: AnyGrid | None
    method: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice for every weight of a decoder, in the order of the forward pass."""

    preset: str
    choices: tuple[Choice, ...]

    def __getitem__(self, name: str) -> Choice:
        for choice in self.choices:
            if choice.weight.name == name:
                return choice
        raise KeyError(name)

    @property
    def quantized(self) -> tuple[Choice, ...]:
        """The choices that have a grid."""
        return tuple(choice for choice in self.choices if choice.grid is not None)

    @property
    def calibrated(self) -> bool:
        """Whether a method needs calibration windows."""
        return self.by_layers or self.uses("imatrix")

    @property
    def by_layers(self) -> bool:
        """Whether a method works on one decoder layer after the other."""
        return any(map(self.uses, BY_LAYERS))

    @property
    def holds(self) -> bool:
        """Whether some calibration windows are kept to measure on."""
        return any(map(self.uses, _LEARNT))

    def uses(self, method: str) -> bool:
        """Whether a weight is quantized by `method`."""
        return any(choice.method == method for choice in self.choices)

    def trained(self, names: Collection[str]) -> Plan:
        """This plan, after these weights were trained."""
        return replace(
            self,
            choices=tuple(
                replace(choice, method=TRAINED) if choice.weight.name in names else choice
                for choice in self.choices
            ),
        )

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """{what a mix gave instead of its own type, and why: the matrices that got it}."""
        found: dict[str, list[str]] = {}
        for choice in self.choices:
            if _INSTEAD in choice.reason:
                found.setdefault(choice.reason, []).append(choice.weight.name)
        return found

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a tied table counts once."""
        return sum(prod(choice.weight.shape) for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        """The preset, and grid (null: float), method and reason by weight name."""
        return {
            "preset": self.preset,
            "weights": {
                choice.weight.name: {
                    "grid": choice.grid.name if choice.grid else None,
                    "method": choice.method,
                    "reason": choice.reason,
                }
                for choice in self.choices
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], config: DecoderConfig) -> Plan:
        """Read what `to_json` wrote for a decoder of this config.

        Raises:
            BadInput: a weight is missing or unknown, or a field is malformed.
        """
        expected = weights(config)
        try:
            entries = dict(data["weights"])
            choices = tuple(_read(weight, entries.pop(weight.name)) for weight in expected)
            plan = cls(str(data["preset"]), choices)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed(f"{type(error).__name__}: {error}") from error
        if entries:
            raise _malformed(f"{min(entries)} is not a weight of this decoder")
        return plan


def make_plan(
    config: DecoderConfig,
    preset: str = "int4",
    method: str = "gptq",
    patterns: Mapping[str, str] = _NO_PATTERNS,
) -> Plan:
    """Choose grid and method for every weight.

    Args:
        preset: a key of PRESETS, or one of llama.cpp's mixes.
        method: one of METHODS. Tables use rtn in place of gptq: a table is looked up too, and
            calibrating it as a head makes its lookups worse. Linears of a ggml type whose codes
            gptq cannot choose use imatrix in its place; grids with a codebook use rtn-absmax;
            palettized grids kmeans in place of rtn. What autoround or auto cannot do is done as
            by gptq, what hqq cannot as by rtn.
        patterns: shell-style pattern on the weight name -> grid name or "float16"; where several
            match, the last one decides.

    Raises:
        UsageError: unknown preset, method or grid name; a pattern that matches no matrix; a method
            that a grid does not have.
    """
    if preset not in PRESETS and preset not in MIXES:
        raise UsageError(
            f"preset {preset!r} is not known",
            f"the presets are {', '.join(PRESETS)}, and llama.cpp's {', '.join(MIXES)}",
            "choose one of them, or set grids by pattern",
        )
    if method == TRAINED:
        raise UsageError(
            "an export does not train by itself",
            "method qat is a training run of its own, which writes a quantized checkpoint",
            "run `slimport qat MODEL --train FILE -o FOLDER`, then export with --quantized FOLDER",
        )
    if method not in METHODS:
        raise UsageError(
            f"method {method!r} is not known",
            f"slimport quantizes by {', '.join(METHODS)}",
            "choose one of them with --method",
        )
    grids = {pattern: _grid(pattern, name) for pattern, name in patterns.items()}
    every = weights(config)
    for pattern in patterns:
        if not any(weight.is_matrix and fnmatchcase(weight.name, pattern) for weight in every):
            raise UsageError(
                f"pattern {pattern!r} matches no matrix of this model",
                f"patterns are compared with whole names such as {every[0].name}",
                "correct the pattern; `slimport inspect --json` lists every name",
            )
    return Plan(preset, tuple(_choose(w, config, preset, method, grids) for w in every))


def keep_given(
    plan: Plan, given: Mapping[str, AnyGrid], maker: str, patterns: Mapping[str, str]
) -> Plan:
    """A plan for a checkpoint that is quantized: its codes stay as they are.

    Linears that their maker left in full precision stay float16 unless a pattern gives them a grid;
    tables are as in the plan.

    Args:
        given: {source name: grid} of the weights that are quantized.
        maker: of their codes.
        patterns: those that the plan was made with.

    Raises:
        UsageError: a pattern would quantize a weight again.
    """

    def kept(choice: Choice) -> Choice:
        weight, grid = choice.weight, given.get(choice.weight.name)
        matching = [pattern for pattern in patterns if fnmatchcase(weight.name, pattern)]
        if grid is not None:
            if matching and patterns[matching[-1]] != grid.name:
                raise UsageError(
                    f"{weight.name} is quantized already, on {grid.name}",
                    f"pattern {matching[-1]} asks for {patterns[matching[-1]]}, and nothing is"
                    " quantized twice",
                    "remove the pattern, or export the full-precision model",
                )
            return Choice(weight, grid, GIVEN, f"{maker} quantized it")
        if weight.is_linear and choice.grid is not None and not matching:
            return Choice(weight, None, "", f"{maker} left it as it is: stays {FLOAT}")
        return choice

    return Plan(plan.preset, tuple(kept(choice) for choice in plan.choices))


def _choose(
    weight: Weight,
    config: DecoderConfig,
    preset: str,
    method: str,
    patterns: Mapping[str, AnyGrid | None],
) -> Choice:
    if not weight.is_matrix:
        return Choice(weight, None, "", "a vector: stays float32")
    matching = [pattern for pattern in patterns if fnmatchcase(weight.name, pattern)]
    grid: AnyGrid | None
    if matching:
        grid, reason = patterns[matching[-1]], f"pattern {matching[-1]}"
    elif preset in PRESETS:
        grid, reason = _of_preset(preset, weight, config)
    else:
        grid, reason = _of_mix(preset, weight, config, weighted=method in (*BY_LAYERS, "imatrix"))
    if grid is None:
        return Choice(weight, None, "", f"{reason}: stays {FLOAT}")
    rows, columns = weight.shape
    if not grid.fits((rows, columns)):
        what = f"{rows} rows" if isinstance(grid, PaletteGrid) else f"rows of {columns}"
        why = f"{what} do not divide into groups of {grid.group}"
        return Choice(weight, None, "", f"{why}: stays {FLOAT}")
    return Choice(weight, grid, method_of(weight, grid, method), reason)


def _of_preset(name: str, weight: Weight, config: DecoderConfig) -> tuple[Grid | PaletteGrid, str]:
    preset, reason = PRESETS[name], f"preset {name}"
    if preset.promoted and _is_promoted(weight, config.layers):
        return preset.promoted, f"{reason}: promoted"
    return preset.tables if weight.is_table else preset.linears, reason


def _is_promoted(weight: Weight, layers: int) -> bool:
    """Values and down projections in the first and last eighth, and every third layer between.

    These are the Linears that llama.cpp's `_K_M` mixes give more bits in most models; nothing is
    measured of this one.
    """
    if weight.kind not in (Kind.V, Kind.DOWN) or weight.layer is None:
        return False
    eighth = max(1, layers // 8)
    first, last = weight.layer < eighth, weight.layer >= layers - eighth
    return first or last or (weight.layer - eighth) % 3 == 2


def _of_mix(
    mix: str, weight: Weight, config: DecoderConfig, weighted: bool
) -> tuple[BlockGrid | None, str]:
    wanted = wanted_type(mix, weight, config, weighted)
    columns = weight.shape[1]
    held = held_type(mix, wanted, weight, config)
    reason = f"mix {mix}"
    if held is not wanted:
        reason += f": {held.name} {_INSTEAD} {wanted.name}, whose blocks do not divide {columns}"
    return (None if held is Type.F16 else BlockGrid(held)), reason


def method_of(weight: Weight, grid: AnyGrid, method: str) -> str:
    """`method`, or what takes its place for this weight."""
    if method == "auto":
        several = not weight.is_table and len(_candidates(weight, grid)) > 1
        return "auto" if several else method_of(weight, grid, "gptq")
    # Whose values are steps from a zero that is the same for all groups.
    steps = isinstance(grid, Grid) and grid.levels is None and not grid.asymmetric
    if method == "autoround" and (weight.is_table or not steps):
        method = "gptq"
    if method == "hqq" and not steps:
        method = "rtn"
    if isinstance(grid, PaletteGrid):
        return _method_of_palette(weight, grid, method)
    if method == "kmeans":
        if not weight.is_table:
            raise UsageError(
                f"{weight.name}: {grid.name} does not take method kmeans",
                "it finds the levels of palettized grids, and those of others are what they are",
                f"give one of {', '.join(PALETTE_GRIDS)}, or choose --method gptq",
            )
        method = "rtn"
    if isinstance(grid, Grid):
        if method == "imatrix" and not weight.is_table:
            raise UsageError(
                f"{weight.name}: {grid.name} does not take method imatrix",
                "an importance matrix is for ggml's kernels, which write ggml's types only, and for"
                " k-means",
                "give a ggml type such as --preset Q4_K_M, or choose --method gptq",
            )
        if grid.levels is not None:  # its scales are what they are
            return "rtn-absmax"
        return "rtn" if weight.is_table and method in ("gptq", "imatrix") else method
    if method == "rtn-absmax":
        raise UsageError(
            f"{weight.name}: {grid.name} does not take rtn without its search",
            "ggml's kernels search their scales in their own way",
            "choose --method rtn",
        )
    if weight.is_table and (method == "gptq" or grid.type in NEEDS_IMPORTANCE):
        method = "rtn"
    elif method == "gptq" and grid.type not in CODES:
        method = "imatrix"
    if method == "rtn" and grid.type in NEEDS_IMPORTANCE:
        raise UsageError(
            f"{weight.name}: {grid.name} cannot be rounded without an importance matrix",
            "a table has none" if weight.is_table else "method rtn has none",
            "choose another type for it" if weight.is_table else "choose --method imatrix or gptq",
        )
    return method


def _candidates(weight: Weight, grid: AnyGrid) -> set[str]:
    found = set()
    for method in CANDIDATES:
        with suppress(UsageError):  # the grid does not take it
            found.add(method_of(weight, grid, method))
    return found


def _method_of_palette(weight: Weight, grid: PaletteGrid, method: str) -> str:
    if method == "rtn-absmax":
        raise UsageError(
            f"{weight.name}: {grid.name} does not take rtn without its search",
            "its levels are found by k-means, and there are none to begin with",
            "choose --method kmeans",
        )
    calibrated = method in ("gptq", "imatrix") and not weight.is_table
    return method if calibrated else "kmeans"


def _grid(pattern: str, name: str) -> AnyGrid | None:
    if name == FLOAT:
        return None
    if name not in ANY_GRIDS:
        raise UsageError(
            f"grid {name!r} of pattern {pattern!r} is not known",
            f"the grids are {listed([*GRIDS, *PALETTE_GRIDS])}, ggml's"
            f" {', '.join(BLOCK_GRIDS)}, or {FLOAT} to leave a weight as it is",
            "choose one of them",
        )
    return ANY_GRIDS[name]


def _read(weight: Weight, entry: Mapping[str, Any]) -> Choice:
    name, method = entry["grid"], str(entry["method"])
    grid = None if name is None else ANY_GRIDS[name]
    if grid is not None and not (
        weight.is_matrix and grid.fits((weight.shape[0], weight.shape[1]))
    ):
        raise ValueError(f"{weight.name} of shape {weight.shape} cannot be on {name}")
    if method not in ((*METHODS, GIVEN, TRAINED) if grid else ("",)):
        raise ValueError(f"{weight.name} has grid {name} and method {method!r}")
    return Choice(weight, grid, method, str(entry["reason"]))


def _malformed(why: str) -> BadInput:
    return BadInput("the plan in quantization.json is malformed", why, "quantize the model again")


def grid_summary(plan: Plan) -> list[dict[str, Any]]:
    """Weights and bytes of codes and scales by grid and method."""
    weights: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for choice in plan.choices:
        if not choice.weight.is_matrix:
            continue
        rows, columns = choice.weight.shape
        key = (choice.grid.name if choice.grid else "float16", choice.method)
        weights[key] += 1
        sizes[key] += choice.grid.bytes_of((rows, columns)) if choice.grid else 2 * rows * columns
    return [
        {"grid": grid, "method": method, "weights": count, "bytes": sizes[grid, method]}
        for (grid, method), count in sorted(weights.items())
    ]
