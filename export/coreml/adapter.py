"""Separate adapters in a package: a function for each, over the weights that it shares.

A function is the decoder with its factors beside the matrices, in float16. In `adapters/` stands
for each a small file that names its function, and the base that it was made for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...adapters.adapter import Adapter
from ...architectures import DecoderConfig, weights
from ...bundle import canonical_json
from ...errors import Unsupported
from ...quantize.floats import half
from ..container import Base, Separate, foreign_adapter, not_the_adapter, refuse_all_but_layers
from ..file import write_bytes
from ..layout import Stored
from .package import packages_in
from .reader import File

SUFFIX, SCHEMA = ".json", "slimport.coreml-adapter/1"
_WITH = "with_"
HALVES = ("lora_a", "lora_b")


class Factor(NamedTuple):
    """A factor of an update: where it goes, and its numbers."""

    stored: Stored
    layer: int | None
    values: npt.NDArray[np.float16]


def function_of(adapter: Adapter) -> str:
    """The name of an adapter's function, as MIL writes identifiers."""
    return _WITH + re.sub(r"\W", "_", adapter.name)


def factor_name(function: str, matrix: str, which: str) -> str:
    """The name of a stored factor; `which` is one of HALVES."""
    return f"{function}/{matrix}.{which}"


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported if the adapter is more than an addition to matrices of decoder layers."""
    refuse_all_but_layers(adapter, "Core ML")


def refuse_same_names(adapters: Sequence[Separate]) -> None:
    """Raise Unsupported if two adapters would have one function."""
    names = [function_of(each.adapter) for each in adapters]
    for name in names:
        if names.count(name) > 1:
            raise Unsupported(
                f"two adapters would be the function {name}",
                "a name of Core ML has letters, digits and _ alone",
                "rename one of them: --adapter NAME=PATH",
            )


def factors(separate: Separate, config: DecoderConfig) -> Iterator[Factor]:
    """a (rank, columns), b (rows, rank) of each update, in the order of the forward pass.

    All scales are in b.

    Raises:
        Unsupported: a number does not fit float16.
    """
    function = function_of(separate.adapter)
    for weight in weights(config):
        delta = separate.adapter.deltas.get(weight.name)
        if delta is None:
            continue
        stem = weight.name.removesuffix(".weight")
        b = delta.b * np.float32(separate.scale * delta.scale)
        for which, values in zip(HALVES, (delta.a, b), strict=True):
            name = factor_name(function, stem, which)
            stored = Stored(name, "<f2", values.shape, (), "values")
            yield Factor(stored, weight.layer, half(name, values))


def predict_adapter(adapter: Adapter, base: Base) -> dict[str, int]:
    """{file name: bytes} of what `write_adapter` writes, to the byte."""
    return {f"{adapter.name}{SUFFIX}": len(_described(adapter, base))}


def write_adapter(adapter: Adapter, base: Base, folder: Path, scale: float = 1.0) -> Path:
    """Write and fsync `NAME.json`; the function is in the package already."""
    path = folder / f"{adapter.name}{SUFFIX}"
    write_bytes(path, _described(adapter, base))
    return path


def check_adapter(path: Path, adapter: Adapter, base: Base, scale: float = 1.0) -> None:
    """Read an adapter's factors back from the packages in the folder above.

    Raises:
        BadInput: a file is malformed.
        ValidationFailed: a factor differs, or an update is missing or left over.
    """
    if path.read_bytes() != _described(adapter, base):
        raise not_the_adapter(path, "it is described otherwise")
    folder = path.parent.parent
    found: dict[str, Any] = {}
    for name in packages_in(folder):
        found |= File(folder / name).factors(function_of(adapter))
    wanted = {
        each.stored.name.replace("/", "_").replace(".", "_"): each.values
        for each in factors(Separate(adapter, scale), base.config)
    }
    if found.keys() != wanted.keys():
        name = min(found.keys() ^ wanted.keys())
        raise not_the_adapter(path, f"{name} is missing or left over")
    for name, values in wanted.items():
        if found[name].tobytes() != values.tobytes():
            raise not_the_adapter(path, f"{name} has other numbers")


def refuse_foreign_adapter(path: Path, base: str) -> None:
    """Raise BadInput if an adapter is not for the base with this weights digest."""
    found = read(path)["weights_digest"]
    if found != base:
        raise foreign_adapter(path, f"it is for a base with the digest {found}, not {base}")


def read(path: Path) -> dict[str, str]:
    """What an adapter's file says: its function, and the digest of its base's weights.

    Raises:
        BadInput: it is no such file.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']}")
        return {key: str(found[key]) for key in ("function", "weights_digest")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise foreign_adapter(path, f"it cannot be read: {error}") from error


def _described(adapter: Adapter, base: Base) -> bytes:
    return canonical_json(
        {
            "schema": SCHEMA,
            "function": function_of(adapter),
            "adapter_digest": adapter.digest(),
            "weights_digest": base.weights_digest,
        }
    )
