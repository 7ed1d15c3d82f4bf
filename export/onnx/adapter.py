"""A LoRA adapter as an `.onnx_adapter` file, given to the base when it runs.

Each factor is an input of the graph whose name ends in the base's digest, so ONNX Runtime itself
refuses an adapter that was made for another base.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ...adapters.adapter import Adapter
from ...architectures import Weight, weights
from ...errors import BadInput
from ...quantize.floats import half
from ..container import Base, foreign_adapter, not_the_adapter, refuse_all_but_layers
from ..file import sync_folder
from .layout import FLOAT16, FLOAT32, Float

SUFFIX = ".onnx_adapter"
_ADAPTER_VERSION, _MODEL_VERSION = 1, 1
Factor = npt.NDArray[np.floating[Any]]


def adapter_inputs(matrix: str, base: str) -> tuple[str, str]:
    """The graph's inputs for the factors a and b of an update of `matrix` (without `.weight`)."""
    mark = base.removeprefix("sha256:")[:16]
    return f"{matrix}.lora_a.{mark}", f"{matrix}.lora_b.{mark}"


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported if the adapter is more than an addition to matrices of decoder layers."""
    refuse_all_but_layers(adapter, "ONNX")


def predict_adapter(adapter: Adapter, base: Base, activations: Float = FLOAT32) -> dict[str, int]:
    """{file name: bytes} of what `write_adapter` writes, to the byte: it is written with zeros."""
    zeros = {
        name: np.zeros_like(factor) for name, factor in _factors(adapter, base, 1.0, activations)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sizes"
        _export(zeros, path)
        return {f"{adapter.name}{SUFFIX}": path.stat().st_size}


def write_adapter(
    adapter: Adapter,
    base: Base,
    folder: Path,
    scale: float = 1.0,
    activations: Float = FLOAT32,
) -> Path:
    """Write and fsync `NAME.onnx_adapter`: a (columns, rank) and b (rank, rows).

    They are of the type `activations`. All scales are in b, the user's `scale` among them.

    Raises:
        Unsupported: the adapter is more than an addition to matrices of decoder layers, or a factor
            is beyond float16.
    """
    refuse_adapter(adapter)
    path = folder / f"{adapter.name}{SUFFIX}"
    _export(dict(_factors(adapter, base, scale, activations)), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(folder)
    return path


def check_adapter(
    path: Path,
    adapter: Adapter,
    base: Base,
    scale: float = 1.0,
    activations: Float = FLOAT32,
) -> None:
    """Read an adapter's file back and compare every factor.

    Raises:
        BadInput: the file is malformed.
        ValidationFailed: a factor differs, or an update is missing or left over.
    """
    stored = read_adapter(path)
    wanted = dict(_factors(adapter, base, scale, activations))
    if stored.keys() != wanted.keys():
        name = min(stored.keys() ^ wanted.keys())
        raise not_the_adapter(path, f"{name} is missing or left over")
    for name, factor in wanted.items():
        if stored[name].dtype != factor.dtype or not np.array_equal(stored[name], factor):
            raise not_the_adapter(path, f"{name} has other numbers")


def read_adapter(path: Path) -> dict[str, Factor]:
    """{input of the graph: factor}

    Raises:
        BadInput: the file is malformed.
    """
    try:
        read = ort.AdapterFormat.read_adapter(str(path))
        # Copies: what `numpy` gives lies in the memory of `read`.
        return {name: np.array(value.numpy()) for name, value in read.get_parameters().items()}
    except Exception as error:  # onnxruntime raises its own kinds, none of them public
        raise BadInput(
            f"{path.name} is not the adapter that it should be",
            f"ONNX Runtime says: {str(error).strip().splitlines()[0]}",
            "export it again",
        ) from error


def refuse_foreign_adapter(path: Path, base: str, activations: Float = FLOAT32) -> None:
    """Raise BadInput if an adapter's file is not for the base with this weights digest and type."""
    mark = adapter_inputs("", base)[0].rpartition(".")[2]
    for name, factor in read_adapter(path).items():
        if name.rpartition(".")[2] != mark:
            raise foreign_adapter(path, f"its input {name} is not one of the base {base}")
        if factor.dtype != activations:
            why = (
                f"its input {name} is {factor.dtype}, and that of the base {np.dtype(activations)}"
            )
            raise foreign_adapter(path, why)


def _factors(
    adapter: Adapter, base: Base, scale: float, activations: Float
) -> Iterator[tuple[str, Factor]]:
    """The graph's inputs and what they get, in the order of the forward pass."""
    for weight in weights(base.config):
        delta = adapter.deltas.get(weight.name)
        if delta is None:
            continue
        first, second = adapter_inputs(_matrix(weight), base.weights_digest)
        a, b = delta.a.T, (delta.b * np.float32(scale * delta.scale)).T
        for name, factor in ((first, a), (second, b)):
            rounded = half(name, factor) if activations == FLOAT16 else factor
            yield name, np.ascontiguousarray(rounded, activations)


def _matrix(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")


def _export(factors: dict[str, Factor], path: Path) -> None:
    file = ort.AdapterFormat()
    file.set_adapter_version(_ADAPTER_VERSION)
    file.set_model_version(_MODEL_VERSION)
    values = {name: ort.OrtValue.ortvalue_from_numpy(factor) for name, factor in factors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))
