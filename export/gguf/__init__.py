"""The GGUF container: one file that llama.cpp maps and runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...adapters.adapter import Adapter
from ...architectures import DecoderConfig
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Base, Deployment, ReadBack, foreign_adapter, normalization_notes
from . import compare, layout, reader
from .adapter import BASE, predict_adapter, refuse_adapter, write_adapter
from .device import minimum_runtime, readme
from .metadata import model_metadata, rope_tensors
from .packing import float_bytes, packed_rows, row_order
from .vocabulary import vocabulary_metadata
from .writer import TensorInfo, Value, file_bytes, write_file

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

NAME = "gguf"
FILE = "model.gguf"
LIBRARIES = ("gguf", "xllamacpp")
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()


def context_length(config: DecoderConfig) -> int:
    """Up to a window that llama.cpp does not have, if every layer has one."""
    return layout.as_llama_cpp(config).context_length


def kv_cache(wanted: str) -> str:
    """llama.cpp has every type that a target can want."""
    return wanted


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if GGUF or llama.cpp cannot hold this exactly."""
    layout.tensor_infos(config, plan)
    vocabulary_metadata(tokenizer, config.vocab_size)


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """The same files serve every device."""


def predict(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    name: str,
    deployment: Deployment | None = None,
) -> dict[str, int]:
    """{file name: bytes}, to the byte; `name` is the model's; every deployment has one file."""
    return {FILE: file_bytes(*_header(config, plan, tokenizer, name))}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its blocks} of every weight."""
    infos = layout.tensor_infos(config, plan)
    return {c.weight.name: i.nbytes for c, i in zip(plan.choices, infos, strict=False)}


def write(
    model: QuantizedCheckpoint,
    tokenizer: Tokenizer,
    folder: Path,
    deployment: Deployment | None = None,
) -> list[Path]:
    """Write `model.gguf` tensor by tensor and fsync it; every deployment has the same file.

    Raises:
        Unsupported: as `refuse`, or a float weight beyond float16.
    """
    metadata, infos = _header(model.decoder, model.plan, tokenizer, model.name)
    write_file(folder / FILE, metadata, infos, _data(model, infos))
    return [folder / FILE]


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """What an app must do that llama.cpp does not."""
    return normalization_notes(tokenizer, "llama.cpp")


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, by a reader that shares no code with the packer."""
    return reader.read_back(folder / FILE, config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`, ggml's dequantizers included."""
    return compare.check(model, folder / FILE)


def check_adapter(path: Path, adapter: Adapter, base: Base, scale: float = 1.0) -> None:
    """Compare an adapter's file with the adapter and the base that it is for."""
    compare.check_adapter(path, adapter, base, scale)


def refuse_foreign_adapter(path: Path, base: str) -> None:
    """Raise BadInput if an adapter's file is not for the base with this weights digest."""
    found = reader.open_gguf(path).metadata.get(BASE)
    if found != base:
        raise foreign_adapter(path, f"it is for a base with the digest {found}, not {base}")


def _header(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str
) -> tuple[dict[str, Value], list[TensorInfo]]:
    config = layout.as_llama_cpp(config)
    infos = layout.tensor_infos(config, plan)
    vocabulary = vocabulary_metadata(tokenizer, config.vocab_size)
    return model_metadata(config, name, plan, infos) | vocabulary, infos


def _data(
    model: QuantizedCheckpoint, infos: list[TensorInfo]
) -> Iterator[Iterable[npt.NDArray[Any]]]:
    """The bytes of every tensor, in parts."""
    config = model.decoder
    for choice, info in zip(model.plan.choices, infos, strict=False):
        tensor = model.load(choice.weight.name)
        order = row_order(choice.weight, config)
        if not isinstance(tensor, np.ndarray):
            yield packed_rows(tensor, order)
            continue
        if choice.weight.is_norm:
            tensor = tensor + np.float32(config.family.norm_offset)
        yield [float_bytes(info, tensor, order)]
    for values in rope_tensors(config.rope, config.head_dim).values():
        yield [values]
