"""Reading TOML settings: every key through its reader, sizes, and limits on the metrics.

Shared by recipes and target profiles, so that both refuse an unknown key in the same words.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of report.json that a budget may bound.

    Attributes:
        at_least: whether the limit is a minimum.
        of: the kind of model that has it; None: every kind.
    """

    unit: Literal["bytes", "nats", "fraction", "ratio"]
    at_least: bool = False
    of: Literal["language", "reward"] | None = None


METRICS = {
    "device_bytes": Metric("bytes"),
    "download_bytes": Metric("bytes"),
    "model_bytes": Metric("bytes"),
    "memory_bytes": Metric("bytes"),
    "anonymous_bytes": Metric("bytes"),
    "kl_mean": Metric("nats", of="language"),
    "ppl_ratio": Metric("ratio", of="language"),
    "top1": Metric("fraction", at_least=True, of="language"),
    "score_error": Metric("ratio", of="reward"),
    "pair_agreement": Metric("fraction", at_least=True, of="reward"),
    "npu_nodes": Metric("fraction", at_least=True),
    "npu_weight_bytes": Metric("fraction", at_least=True),
    "gpu_nodes": Metric("fraction", at_least=True),
    "gpu_weight_bytes": Metric("fraction", at_least=True),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: the words for a message, and the folder that paths start from."""

    words: str
    folder: Path

    def key(self, name: str) -> Place:
        """One key deeper: `slimport.toml`, then `slimport.toml: quantize`, then `...quantize.x`."""
        joint = "." if ": " in self.words else ": "
        return Place(f"{self.words}{joint}{name}", self.folder)


Reader = Callable[[Any, Place], Any]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: no such file, unreadable, or not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read",
            error.strerror or str(error),
            "give an existing file; `slimport init` writes a slimport.toml",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML", str(error), "correct that line") from error


def read_table(table: Any, known: Mapping[str, Reader], place: Place) -> dict[str, Any]:
    """Every key of `table` through its reader.

    Raises:
        UsageError: a key that is not in `known`, with its path.
    """
    if not isinstance(table, dict):
        raise wrong(place, table, "a table")
    for name in table:
        if name not in known:
            raise UsageError(
                f"{place.key(name).words} is not a key",
                f"the keys here are {', '.join(known)}",
                "correct or remove it",
            )
    return {name: known[name](value, place.key(name)) for name, value in table.items()}


def wrong(place: Place, value: Any, expected: str) -> UsageError:
    """The error for a value that is not what its key expects."""
    return UsageError(f"{place.words} is {value!r}", f"it must be {expected}", "correct the value")


def text(value: Any, place: Place) -> str:
    if not isinstance(value, str) or not value.strip():
        raise wrong(place, value, "a text")
    return value


def switch(value: Any, place: Place) -> bool:
    if not isinstance(value, bool):
        raise wrong(place, value, "true or false")
    return value


def whole(value: Any, place: Place) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(place, value, "a whole number above zero")
    return value


def number(value: Any, place: Place) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(place, value, "a number")
    return float(value)


def amount(value: Any, place: Place) -> float:
    """A number, 0 or more."""
    found = number(value, place)
    if found < 0:
        raise wrong(place, value, "a number, 0 or more")
    return found


def count(value: Any, place: Place) -> int:
    """A whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise wrong(place, value, "a whole number, 0 or more")
    return value


def names(value: Any, place: Place) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong(place, value, "a list of texts")
    return tuple(text(part, place) for part in value)


def size(value: Any, place: Place) -> int:
    """Bytes, as a whole number or a text such as "1.4 GB" or "200 MiB"."""
    if isinstance(value, str):
        return parse_size(value, place.words)
    return whole(value, place)


def limit_of(metric: str) -> Reader:
    """The reader for a limit on `metric`: a size, a share between 0 and 1, or a number."""
    unit = METRICS[metric].unit
    if unit == "bytes":
        return size

    def read(value: Any, place: Place) -> float:
        limit = number(value, place)
        if limit < 0 or (unit == "fraction" and limit > 1):
            raise wrong(place, value, "between 0 and 1" if unit == "fraction" else "0 or more")
        return limit

    return read


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_size(words: str, where: str = "a size") -> int:
    """Bytes in "1.4 GB" (decimal), "1.4 GiB" (binary) or "512 B".

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b\s*", words, re.IGNORECASE)
    unit = found and {**_UNITS, **_BINARY_UNITS}.get(found[2].lower())
    if not found or not unit:
        raise wrong(Place(where, Path()), words, 'a size such as "1.4 GB" or "1.4 GiB"')
    return int(Decimal(found[1]) * unit)


def format_size(count: float) -> str:
    """Bytes in decimal units with three digits: "512 B", "2.31 MB", "1.40 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:.{max(0, 2 - (abs(count) >= 9.995) - (abs(count) >= 99.95))}f} {unit}"
