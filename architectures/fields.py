"""Numbers of config.json, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadInput, Unsupported

_LARGEST = 1e38  # of float32, as containers hold such a number; sizes are 32-bit integers there


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; None and absent are the same."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        fault = "is missing" if value is None else f"= {value!r:.40} is not a positive number"
        raise BadInput(
            f"config.json: {key} {fault}",
            "the sizes of the model come from config.json, and none is guessed",
            "take config.json from where the model was trained",
        )
    return float(value)


def optional(config: Mapping[str, Any], key: str) -> float | None:
    """A positive number, or None where it is absent."""
    return None if config.get(key) is None else real(config, key)


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number below 2^31."""
    value = real(config, key, default)
    if not (value.is_integer() and value < 2**31):
        raise BadInput(
            f"config.json: {key} = {value} is not a whole number below 2^31",
            "it is a size",
            "take config.json from where the model was trained",
        )
    return int(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A truth value; None and absent are false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise not_held(key, value, "true or false")
    return bool(value)


def not_held(key: str, value: object, held: str) -> Unsupported:
    """The refusal of a value that changes the mathematics."""
    return Unsupported(
        f"config.json: {key} = {value!r} is not supported",
        f"slimport holds {held} here exactly, and nothing else",
        "export a model without it",
    )
