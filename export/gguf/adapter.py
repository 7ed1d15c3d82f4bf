"""A LoRA adapter as a GGUF file of its own, applied by llama.cpp beside the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...adapters.adapter import Adapter, Delta
from ...architectures import DecoderConfig, Weight, weights
from ...errors import Unsupported
from ...quantize.ggml import Type
from ...quantize.grid import Float32
from ..container import Base
from .packing import row_order
from .writer import TensorInfo, Value, file_bytes, write_file

BASE = "slimport.base_weights_digest"  # llama.cpp passes over keys that it does not know


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported if the adapter is more than an addition to matrices of the base."""
    if adapter.why_not_separate:
        raise Unsupported(
            f"the adapter {adapter.name} cannot stay separate in GGUF",
            adapter.why_not_separate,
            "merge it: --adapter-mode merged",
        )


def predict_adapter(adapter: Adapter, base: Base) -> dict[str, int]:
    """{file name: bytes} of what `write_adapter` writes, to the byte."""
    size = file_bytes(_metadata(adapter, base), _infos(_pairs(adapter, base.config)))
    return {f"{adapter.name}.gguf": size}


def write_adapter(adapter: Adapter, base: Base, folder: Path, scale: float = 1.0) -> Path:
    """Write and fsync `NAME.gguf`, a LoRA in float32, bound to its base by the digest.

    llama.cpp scales b @ a by alpha / rank, with one alpha for the file and the rank of each tensor.
    So alpha is the largest rank, and what is left of each true scale goes into b, times `scale`.

    Raises:
        Unsupported: the adapter is more than an addition to matrices of the base.
    """
    refuse_adapter(adapter)
    pairs, path = _pairs(adapter, base.config), folder / f"{adapter.name}.gguf"
    data = _data(adapter, base.config, pairs, scale)
    write_file(path, _metadata(adapter, base), _infos(pairs), data)
    return path


def _pairs(adapter: Adapter, config: DecoderConfig) -> list[tuple[Weight, Delta]]:
    """The updates in the order of the forward pass, each with the weight it is for."""
    return [(w, adapter.deltas[w.name]) for w in weights(config) if w.name in adapter.deltas]


def _metadata(adapter: Adapter, base: Base) -> dict[str, Value]:
    return {
        "general.architecture": base.config.family.gguf,
        "general.type": "adapter",
        "general.name": adapter.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(max(adapter.ranks)),
        BASE: base.weights_digest,
    }


def _infos(pairs: list[tuple[Weight, Delta]]) -> list[TensorInfo]:
    infos = []
    for weight, delta in pairs:
        (rank, columns), rows = delta.a.shape, len(delta.b)
        # An embedding's row is looked up in lora_a, then multiplied by lora_b.
        first = (rows, rank) if delta.embedding else (rank, columns)
        second = (columns, rank) if delta.embedding else (rows, rank)
        infos.append(TensorInfo(f"{weight.gguf}.lora_a", first, Type.F32))
        infos.append(TensorInfo(f"{weight.gguf}.lora_b", second, Type.F32))
    return infos


def _data(
    adapter: Adapter, config: DecoderConfig, pairs: list[tuple[Weight, Delta]], scale: float
) -> Iterator[tuple[Float32]]:
    alpha = max(adapter.ranks)
    for weight, delta in pairs:
        order = row_order(weight, config)
        first, second = delta.a, delta.b if order is None else delta.b[order]
        if delta.embedding:
            first, second = delta.b, delta.a.T
        scaled = second * np.float32(scale * delta.scale * delta.rank / alpha)
        yield (np.ascontiguousarray(first, "<f4"),)
        yield (np.ascontiguousarray(scaled, "<f4"),)
