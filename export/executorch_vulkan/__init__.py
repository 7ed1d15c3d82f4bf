"""The ExecuTorch container for phone GPUs: a decoder that is one graph of the Vulkan backend.

As the container executorch it is written as it stands and not lowered, with the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ...architectures import DecoderConfig
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Base, Deployment, Minimum, ReadBack
from ..executorch.compare import compare
from ..executorch.layout import MODEL
from ..executorch.tokenizer import TOKENIZER, refuse_tokenizer, tokenizer_json
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from ..merged import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from . import device, files, layout, limits, packing, reader
from .device import notes, readme

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

NAME = "executorch-vulkan"
FILE = MODEL
LIBRARIES = ("flatbuffers",)
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()


def context_length(config: DecoderConfig) -> int:
    """Up to a window, which attention on the GPU does not have, and what a buffer holds."""
    return limits.longest_context(config)


def kv_cache(wanted: str) -> str:
    """The cache holds what attention computes."""
    return "f32"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if the backend, a kernel or the runner cannot hold this exactly.

    BadInput for a tokenizer with more tokens than the model.
    """
    layout.layout(config, plan, Deployment(1))
    refuse_tokenizer(tokenizer, config.vocab_size)


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """The same file serves every device."""


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte."""
    placed = layout.layout(config, plan, deployment)
    head = files.head(Base.planned(config, plan, tokenizer, deployment), placed)
    return {FILE: len(head) + placed.layout.nbytes, TOKENIZER: len(tokenizer_json(tokenizer))}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales, or of its numbers}."""
    return layout.layout(config, plan, Deployment(1)).layout.bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write program and tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float table beyond float16.
    """
    placed = layout.layout(model.decoder, model.plan, deployment)
    head = files.head(Base.of(model, tokenizer, deployment), placed)
    write_bytes(folder / TOKENIZER, tokenizer_json(tokenizer))
    tensors = placed.layout.tensors
    contents = ((each.name, each.nbytes, packing.parts(each, model)) for each in tensors)
    write_aligned(folder / FILE, head, contents, ALIGNMENT)
    return [folder / FILE, folder / TOKENIZER]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, by a reader that shares no code with the packer."""
    return reader.read_back(folder, config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`."""
    file = reader.open_file(folder, model.decoder)
    return compare(model, file.held, file.unpack)


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The release whose sources and schemas the program was written from."""
    return device.minimum_runtime()
