"""Which weight gets which grid: presets for a whole model, patterns for single weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from types import MappingProxyType
from typing import Any

from ..architectures import DecoderConfig, Kind, Weight, weights
from ..errors import BadInput, UsageError
from .grid import GRIDS, INT2_G64, INT4_G32, INT4_G32_SIGNED, INT8_ROW, Grid

FLOAT = "float16"  # as a pattern's value: the weight stays float
METHODS = ("rtn", "rtn-absmax", "gptq")  # rtn-absmax: rtn without the search for a scale
_NO_PATTERNS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Preset:
    """The grids of the matrices inside decoder layers and of embedding and head.

    `promoted`: the grid of the Linears that `_is_promoted` names; None: they are like the others.
    """

    linears: Grid
    tables: Grid
    promoted: Grid | None = None


PRESETS = {
    "int4": Preset(INT4_G32, INT8_ROW),
    "int4-all": Preset(INT4_G32, INT4_G32),
    "int4-signed": Preset(INT4_G32_SIGNED, INT8_ROW),
    "int8": Preset(INT8_ROW, INT8_ROW),
    "int2": Preset(INT2_G64, INT8_ROW),
    "mixed": Preset(INT4_G32, INT8_ROW, promoted=INT8_ROW),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one weight.

    Attributes:
        grid: None: the weight stays float (float16 in containers, float32 if it is 1-D).
        method: one of METHODS, or "" where grid is None.
        reason: where the choice comes from, for people.
    """

    weight: Weight
    grid: Grid | None
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
        return any(choice.method == "gptq" for choice in self.choices)

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
        preset: a key of PRESETS.
        method: one of METHODS. Tables never use gptq: a table is looked up too, and calibrating it
            as a head makes its lookups worse.
        patterns: shell-style pattern on the weight name -> grid name or "float16"; where several
            match, the last one decides.

    Raises:
        UsageError: unknown preset, method or grid name; a pattern that matches no matrix.
    """
    chosen = _preset(preset)
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
    choices = []
    for weight in every:
        grid = chosen.tables if weight.is_table else chosen.linears
        reason = f"preset {preset}"
        if chosen.promoted and _is_promoted(weight, config.layers):
            grid, reason = chosen.promoted, f"preset {preset}: promoted"
        choices.append(_choose(weight, grid, reason, method, grids))
    return Plan(preset, tuple(choices))


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


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(
            f"preset {name!r} is not known",
            f"the presets are {', '.join(PRESETS)}",
            "choose one of them, or set grids by pattern",
        )
    return PRESETS[name]


def _grid(pattern: str, name: str) -> Grid | None:
    if name == FLOAT:
        return None
    if name not in GRIDS:
        raise UsageError(
            f"grid {name!r} of pattern {pattern!r} is not known",
            f"the grids are {', '.join(GRIDS)}, or {FLOAT} to leave a weight as it is",
            "choose one of them",
        )
    return GRIDS[name]


def _choose(
    weight: Weight,
    grid: Grid | None,
    reason: str,
    method: str,
    patterns: Mapping[str, Grid | None],
) -> Choice:
    if not weight.is_matrix:
        return Choice(weight, None, "", "a vector: stays float32")
    for pattern, wanted in patterns.items():
        if fnmatchcase(weight.name, pattern):
            grid, reason = wanted, f"pattern {pattern}"
    if grid is None:
        return Choice(weight, None, "", f"{reason}: stays {FLOAT}")
    columns = weight.shape[1]
    if not grid.fits(columns):
        why = f"rows of {columns} do not divide into groups of {grid.group}"
        return Choice(weight, None, "", f"{why}: stays {FLOAT}")
    if weight.is_table and method == "gptq":
        method = "rtn"
    return Choice(weight, grid, method, reason)


def _read(weight: Weight, entry: Mapping[str, Any]) -> Choice:
    name, method = entry["grid"], str(entry["method"])
    grid = None if name is None else GRIDS[name]
    if grid is not None and not (weight.is_matrix and grid.fits(weight.shape[1])):
        raise ValueError(f"{weight.name} of shape {weight.shape} cannot be on {name}")
    if method not in (METHODS if grid else ("",)):
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
