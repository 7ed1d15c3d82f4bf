"""The ONNX container: a folder that onnxruntime-genai runs on phones, Windows and servers.

Functions that take `activations` serve export/onnx_fp16 too, where they are float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment, Minimum, ReadBack
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from . import compare, device, genai, layout, packing, reader
from . import tokenizer as tokenizer_files
from .adapter import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from .decoder import decoder_graph, reward_graph
from .device import readme
from .graph import DATA
from .layout import FLOAT16, FLOAT32, Float, GraphLayout
from .notes import notes

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

NAME = "onnx"
FILE = reader.MODEL
LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()
_ANY_DIGEST = "sha256:" + "0" * 64
_HEAD_STEP = 16  # GroupQueryAttention rotates pairs in steps of 8


def context_length(config: DecoderConfig) -> int:
    """Windows and ropes are those of the model: nothing shortens it."""
    return config.context_length


def kv_cache(wanted: str, activations: Float = FLOAT32) -> str:
    """The cache holds what the graph computes."""
    return "f16" if activations == FLOAT16 else "f32"


def refuse(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, activations: Float = FLOAT32
) -> None:
    """Raise Unsupported if the graph, ONNX Runtime or genai cannot hold this exactly."""
    layout.layout(config, plan, Deployment(1), activations)
    tokenizer_files.refuse(tokenizer, config.vocab_size)
    for rope in config.ropes:
        if rope.rotated(config.head_dim) % _HEAD_STEP:
            raise Unsupported(
                f"ONNX Runtime cannot rotate {rope.rotated(config.head_dim)} numbers of a head",
                f"GroupQueryAttention takes multiples of {_HEAD_STEP}",
                "write GGUF: --container gguf",
            )


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """The same files serve every device."""


def predict(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    name: str,
    deployment: Deployment,
    activations: Float = FLOAT32,
) -> dict[str, int]:
    """{file name: bytes}, to the byte; `name` is the model's."""
    placed = layout.layout(config, plan, deployment, activations)
    graph = _graph(config, placed, deployment, name, _ANY_DIGEST)
    options = genai.session_options(plan)
    beside = genai.files(config, tokenizer, deployment, options=options)
    sizes = {file: len(content) for file, content in beside.items()}
    return {FILE: len(graph), DATA: placed.nbytes, **sizes}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes, scales and zero points, or of its numbers}."""
    return layout.layout(config, plan, Deployment(1)).bytes_by_weight()


def write(
    model: QuantizedCheckpoint,
    tokenizer: Tokenizer,
    folder: Path,
    deployment: Deployment,
    activations: Float = FLOAT32,
) -> list[Path]:
    """Write model, data, genai's configuration and the tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float weight beyond float16.
    """
    config = model.decoder
    placed = layout.layout(config, model.plan, deployment, activations)
    graph = _graph(config, placed, deployment, model.name, model.weights_digest)
    options = genai.session_options(model.plan)
    beside = genai.files(config, tokenizer, deployment, options=options)
    for name, content in {FILE: graph, **beside}.items():
        write_bytes(folder / name, content)
    write_aligned(folder / DATA, b"", _data(model, placed), ALIGNMENT)
    return [folder / name for name in (FILE, DATA, *beside)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished files, by a reader that shares no code with the packer."""
    return reader.read_back(reader.open_file(folder), config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`, and some with ONNX Runtime's kernels."""
    return compare.check(model, reader.open_file(folder))


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The releases of ONNX Runtime and genai that were tried."""
    return device.minimum_runtime()


def _graph(
    config: DecoderConfig,
    placed: GraphLayout,
    deployment: Deployment,
    name: str,
    digest: str,
) -> bytes:
    if config.reward:
        graph = reward_graph(config, placed)
    else:
        graph = decoder_graph(config, placed, deployment, digest)
    return graph.serialize(name, {"slimport.weights_digest": digest})


def _data(
    model: QuantizedCheckpoint, placed: GraphLayout
) -> Iterator[tuple[str, int, Iterable[npt.NDArray[Any]]]]:
    """Name, bytes and content of every tensor."""
    for tensor in placed.tensors:
        if tensor.choices:
            yield tensor.name, tensor.nbytes, packing.parts(tensor, model, placed.activations)
        else:
            yield tensor.name, tensor.nbytes, packing.rope_parts(tensor, model.decoder)
