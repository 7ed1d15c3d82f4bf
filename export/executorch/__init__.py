"""The ExecuTorch container: a program for the CPU that the stock runners of Android and iOS load.

It is written as it stands, and not lowered from a traced model: in a second, with one tensor in
memory, and with the codes of the quantized checkpoint in XNNPACK's own layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ...architectures import DecoderConfig
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Base, Deployment, Minimum, ReadBack
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from . import compare, device, files, layout, packing, reader
from .adapter import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from .device import notes, readme
from .layout import WEIGHTS
from .tokenizer import TOKENIZER, refuse_tokenizer, tokenizer_json

__all__ = [
    "CALIBRATED",
    "ESTIMATED",
    "FILE",
    "LIBRARIES",
    "NAME",
    "PROOF",
    "check",
    "check_adapter",
    "context_length",
    "kv_cache",
    "minimum_runtime",
    "notes",
    "predict",
    "predict_adapter",
    "read_back",
    "readme",
    "refuse",
    "refuse_adapter",
    "refuse_deployment",
    "refuse_foreign_adapter",
    "tensor_bytes",
    "write",
    "write_adapter",
]

NAME = "executorch"
FILE = layout.MODEL
LIBRARIES = ("flatbuffers",)
_CACHE_BYTES = 2**31 - 1  # of the keys or values of a layer
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()


def context_length(config: DecoderConfig) -> int:
    """That of the model: windows and ropes are its own. The kernel of the cache counts in int32."""
    return min(config.context_length, _CACHE_BYTES // (4 * config.kv_heads * config.head_dim))


def kv_cache(wanted: str) -> str:
    """The cache holds what attention computes."""
    return "f32"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if XNNPACK, a kernel or the runner cannot hold this exactly.

    BadInput for a tokenizer with more tokens than the model.
    """
    layout.layout(config, plan, Deployment(1))
    refuse_tokenizer(tokenizer, config.vocab_size)


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """The same files serve every device."""


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte."""
    placed = layout.layout(config, plan, deployment)
    heads = _heads(Base.planned(config, plan, tokenizer, deployment), placed)
    sizes = {file: len(head) for file, head in heads.items()}
    sizes[_holder(deployment)] += placed.layout.nbytes
    return {**sizes, TOKENIZER: len(tokenizer_json(tokenizer))}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales, or of its numbers}."""
    return layout.layout(config, plan, Deployment(1)).layout.bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write program and tokenizer, and fsync them; with separate adapters the weights aside.

    Raises:
        Unsupported: as `refuse`, or a float table beyond float16.
    """
    placed = layout.layout(model.decoder, model.plan, deployment)
    heads = _heads(Base.of(model, tokenizer, deployment), placed)
    write_bytes(folder / TOKENIZER, tokenizer_json(tokenizer))
    for file, head in heads.items():
        tensors = _data(model, placed) if file == _holder(deployment) else ()
        write_aligned(folder / file, head, tensors, ALIGNMENT)
    return [folder / file for file in (*heads, TOKENIZER)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, by a reader that shares no code with the packer."""
    return reader.read_back(folder, config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`."""
    return compare.check(model, folder)


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The release of ExecuTorch that was tried."""
    return device.minimum_runtime()


def _holder(deployment: Deployment) -> str:
    """The file with the weights."""
    return WEIGHTS if deployment.adapted else FILE


def _heads(base: Base, placed: layout.Placed) -> dict[str, bytes]:
    """{file: what lies before its tensors}"""
    if not base.deployment.adapted:
        return {FILE: files.whole(base, placed)}
    return {FILE: files.sharing(base, placed), WEIGHTS: files.weights(base, placed)}


def _data(
    model: QuantizedCheckpoint, placed: layout.Placed
) -> Iterator[tuple[str, int, Iterable[npt.NDArray[Any]]]]:
    """Name, bytes and content of every tensor."""
    for tensor in placed.layout.tensors:
        yield tensor.name, tensor.nbytes, packing.parts(tensor, model)
