"""ONNX Runtime for a float16 graph: judged on the CPU provider, made for a GPU that is not here."""

from __future__ import annotations

from pathlib import Path

from ..runtime import Ids
from . import onnxruntime
from .onnxruntime import (
    EXECUTES,
    PREDICTED,
    SESSION,
    accelerator,
    effort,
    generate,
    logits,
    measure,
    memory_on,
    render,
    tokenize,
    version,
    vocabulary,
)

__all__ = [
    "EXECUTES",
    "PREDICTED",
    "SESSION",
    "UNKNOWN",
    "accelerator",
    "effort",
    "exact_logits",
    "generate",
    "logits",
    "measure",
    "memory_on",
    "render",
    "tokenize",
    "version",
    "vocabulary",
]

# Nats at any token. Factors of an adapter are float16, and those of the oracle are not: 4e-6 was
# measured for one that changed the logits of a tiny model by whole units.
_ROUNDED_ADAPTER = 1e-4
UNKNOWN = (
    "GPU: no GPU executed the file; the CPU provider computed its accuracy, speed and memory",
    "GPU: rounding inside of its kernels, and the operators that its provider leaves to the CPU",
)


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """As that of onnxruntime, with room for an adapter's rounding."""
    noise = onnxruntime.exact_logits(file, windows, out, adapter=adapter)
    return noise if adapter is None else _ROUNDED_ADAPTER
