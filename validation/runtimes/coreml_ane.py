"""Core ML packages for the Neural Engine: run as those of `coreml`, and held to its rules.

Fills `validation.runtime.Runtime` for the container coreml-ane.
"""

from __future__ import annotations

from pathlib import Path

from ...export.coreml.package import bundle_of, packages_in
from ..runtime import Accelerator, Ids
from . import coreml, neural_engine
from .coreml import (
    EXECUTES,
    PREDICTED,
    SESSION,
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

UNKNOWN = (
    *coreml.UNKNOWN,
    "Neural Engine: whether it takes every operation; rules say what is known to keep one away",
)


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """As that of coreml, with room for constants that are float16.

    Norms, factors and tables of ropes: 1.4e-5 was measured on tiny models of all families.
    """
    coreml.exact_logits(file, windows, out, adapter=adapter)
    return coreml.ROUNDED


def accelerator(file: Path) -> Accelerator:
    """How much of layers and head no rule keeps away from the Neural Engine."""
    folder = bundle_of(file)
    found = neural_engine.inspect([folder / name for name in packages_in(folder)])
    shares = found.run / found.operations, found.run_bytes / found.weight_bytes
    return Accelerator(*shares, "npu", found.findings)
