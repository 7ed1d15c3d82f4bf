"""The ORT container: one file for reduced builds of ONNX Runtime, with their operator list.

The graph, its tokenizer files and its adapters are those of export/onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ...architectures import DecoderConfig
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from .. import onnx
from ..container import Deployment, ReadBack
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from ..onnx import (
    check_adapter,
    compare,
    context_length,
    genai,
    kv_cache,
    minimum_runtime,
    notes,
    predict_adapter,
    refuse_adapter,
    refuse_deployment,
    refuse_foreign_adapter,
    write_adapter,
)
from ..onnx import layout as onnx_layout
from ..onnx import reader as onnx_reader
from ..onnx.decoder import decoder_graph
from . import layout, reader
from .conversion import Converted, convert
from .device import readme

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

NAME = "ort"
FILE = reader.MODEL
OPERATORS = "required_operators.config"
LIBRARIES = (*onnx.LIBRARIES, "flatbuffers")
CALIBRATED, PROOF, ESTIMATED = False, (OPERATORS,), tuple[str, ...]()
_ANY_DIGEST = "sha256:" + "0" * 64
# The file is mapped, and what is not packed anew is read from the mapping.
_OPTIONS = {
    "session.use_memory_mapped_ort_model": "1",
    "session.use_ort_model_bytes_for_initializers": "1",
}


class _Parts(NamedTuple):
    """What the folder holds; `stored` are the tensors of model.onnx, `placed` those of FILE."""

    stored: onnx_layout.GraphLayout
    placed: onnx_layout.GraphLayout
    converted: Converted
    beside: Mapping[str, bytes]


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if the graph, ONNX Runtime or genai cannot hold this exactly.

    A model of over 2 GB is refused, counted with the tables of its longest context.
    """
    onnx.refuse(config, plan, tokenizer)
    longest = Deployment(context_length(config))
    placed = layout.widened(onnx_layout.layout(config, plan, longest))
    layout.refuse_size(layout.data_bytes(placed))


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte; `name` is the model's."""
    parts = _parts(config, plan, tokenizer, deployment, name, _ANY_DIGEST)
    model = len(parts.converted.head) + layout.data_bytes(parts.placed)
    sizes = {file: len(content) for file, content in parts.beside.items()}
    return {FILE: model, **sizes}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes, scales and zero points, or of its numbers}."""
    return layout.widened(onnx_layout.layout(config, plan, Deployment(1))).bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write model, operator list, genai's configuration and the tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float weight beyond float16.
    """
    given = (model.decoder, model.plan, tokenizer, deployment)
    parts = _parts(*given, model.name, model.weights_digest)
    for name, content in parts.beside.items():
        write_bytes(folder / name, content)
    tensors = layout.data(model, parts.stored, parts.placed)
    write_aligned(folder / FILE, parts.converted.head, tensors, ALIGNMENT)
    return [folder / name for name in (FILE, *parts.beside)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, by a reader that shares no code with the packer."""
    with reader.named():
        yield from onnx_reader.read_back(reader.open_file(folder), config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`, and some with ONNX Runtime's kernels."""
    with reader.named():
        return compare.check(model, reader.open_file(folder))


def _parts(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    deployment: Deployment,
    name: str,
    digest: str,
) -> _Parts:
    stored = onnx_layout.layout(config, plan, deployment)
    placed = layout.widened(stored)
    layout.refuse_size(layout.data_bytes(placed))
    graph = decoder_graph(config, placed, deployment, digest)
    content = graph.serialize(name, {"slimport.weights_digest": digest})
    converted = convert(content, layout.blobs(placed))
    options = _OPTIONS | genai.session_options(plan)
    beside = genai.files(config, tokenizer, deployment, FILE, options)
    return _Parts(stored, placed, converted, {**beside, OPERATORS: converted.operators})
