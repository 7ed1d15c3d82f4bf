"""Rotary position embedding, as `modeling_rope_utils.py` of transformers computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from ..errors import Unsupported
from .fields import not_held, real, whole


@dataclass(frozen=True, slots=True)
class Rope:
    """How fast each pair of a head turns.

    `factor` applies to all kinds but default; low and high to llama3; fast and slow (turns within
    the original context, between which frequencies are blended) to yarn, which also scales
    cosines and sines by `0.1 ln(factor) + 1`. longrope divides the frequency of pair i by
    short_factors[i] (by long_factors[i] beyond the original context) and scales cosines and sines
    by `attention_factor`. `share` of a head is rotated, its first part.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    share: float = 1.0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.share)


_ORIGINAL = "original_max_position_embeddings"
# Keys of config.json: those that a kind needs, and those that it may have.
_NEEDED = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {"factor", _ORIGINAL},
}
_OPTIONAL = {"yarn": {"beta_fast", "beta_slow"}}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_ropes(config: Mapping[str, Any], two: bool) -> tuple[Rope, Rope | None]:
    """Rope of the whole model, and that of its sliding layers where they have their own.

    It stands in `rope_parameters` (transformers 5) or in `rope_theta` + `rope_scaling` (before).

    Args:
        two: whether sliding layers of this family turn at a rate of their own.

    Raises:
        Unsupported: a kind or key that is not understood.
        BadInput: a value that is no positive number.
    """
    given, scaling = _table(config, "rope_parameters"), _table(config, "rope_scaling")
    if given and scaling and given != scaling:  # releases of transformers differ in which one wins
        raise not_held("rope_scaling", scaling, "it in rope_parameters")
    if two and given and not given.keys() <= {_FULL, _SLIDING}:
        raise not_held("rope_parameters", given, f"{_FULL} and {_SLIDING}")
    if two and "type" in scaling:  # transformers passes over this spelling here
        raise not_held("rope_scaling", scaling, "rope_type")
    if two and given:
        main = _rope(_table(given, _FULL), real(config, "rope_theta", 1e4))
        local = _rope(_table(given, _SLIDING), real(config, "rope_local_base_freq", 1e4))
        return main, local
    merged = scaling | given
    share = real(merged, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0))
    merged.pop("partial_rotary_factor", None)
    if "longrope" in (merged.get("rope_type"), merged.get("type")):
        return _longrope(config, merged, share), None
    main = replace(_rope(merged, real(config, "rope_theta", 1e4)), share=share)
    return main, Rope(real(config, "rope_local_base_freq", 1e4)) if two else None


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise not_held(key, given, "an object")
    return {name: value for name, value in given.items() if value is not None}


def _longrope(config: Mapping[str, Any], scaling: Mapping[str, Any], share: float) -> Rope:
    """Ding et al. 2024 (arXiv:2402.13753), as Phi-3 has it."""
    known = {"rope_type", "type", "rope_theta", "short_factor", "long_factor", _ORIGINAL, "factor"}
    if odd := sorted(scaling.keys() - known):
        raise not_held(odd[0], scaling[odd[0]], "longrope without it")
    original = whole(scaling if config.get(_ORIGINAL) is None else config, _ORIGINAL)
    if scaling.get(_ORIGINAL, original) != original or original < 2:
        raise not_held(_ORIGINAL, scaling.get(_ORIGINAL, original), f"one number, here {original},")
    factor = real(scaling, "factor", whole(config, "max_position_embeddings") / original)
    factors = []
    for key in ("short_factor", "long_factor"):
        given = scaling.get(key)
        if not isinstance(given, list):
            raise not_held(key, given, "a list of numbers")
        factors.append(tuple(real({key: value}, key) for value in given))
    return Rope(
        theta=real(scaling, "rope_theta", real(config, "rope_theta", 1e4)),
        kind="longrope",
        factor=factor,
        original_context=original,
        share=share,
        attention_factor=math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original)),
        short_factors=factors[0],
        long_factors=factors[1],
    )


def _rope(scaling: dict[str, Any], theta: float) -> Rope:
    theta = real(scaling, "rope_theta", theta)
    scaling.pop("rope_theta", None)
    old_name = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or old_name or "default"
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise not_held("rope_type", kind, ", ".join(_NEEDED))
    needed, allowed = _NEEDED[kind], _NEEDED[kind] | _OPTIONAL.get(kind, set())
    odd = sorted((needed - set(scaling)) | (set(scaling) - allowed))
    if odd:
        fault = "has no" if odd[0] in needed else "does not know"
        raise Unsupported(
            f"config.json: rope of type {kind} {fault} {odd[0]}",
            f"its keys are {', '.join(sorted(allowed)) or 'none but rope_theta'}",
            "take config.json from where the model was trained",
        )
    values: dict[str, Any] = {key: real(scaling, key) for key in scaling if key != _ORIGINAL}
    if _ORIGINAL in scaling:
        values["original_context"] = whole(scaling, _ORIGINAL)
    if kind == "yarn" and (
        theta <= 1 or values.get("beta_fast", 32.0) <= values.get("beta_slow", 1.0)
    ):
        raise not_held("rope_scaling", scaling, "a theta above 1 and beta_fast above beta_slow")
    return Rope(theta=theta, kind=cast(Any, kind), **values)
