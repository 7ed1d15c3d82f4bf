"""The QNN container: context binaries for the Qualcomm NPU, and the graphs they are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...architectures import EMBEDDING, DecoderConfig
from ...errors import Unsupported, UsageError
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment, Minimum, ReadBack
from ..file import sync_folder, write_aligned, write_bytes
from ..layout import ALIGNMENT, Layout, shortest_window
from ..merged import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from . import calibration, compare, device, layout, packing, reader, sdk, tables
from .chips import chip_of
from .compilation import binary_of, compile_graph
from .decoder import Size, Vectors, decoder_graph
from .encoding import Range
from .static import DATA, Static

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

NAME = "qnn"
_GRAPHS = ("decode", "prefill")
FILE = "decode.onnx"
LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", sdk.DISTRIBUTION)
CALIBRATED = True
_QDQ, _TOKENIZER = "qdq", "tokenizer.json"
PROOF = (f"{_QDQ}/{DATA}", *(f"{_QDQ}/{name}.onnx" for name in _GRAPHS))
_CONTEXT_FILES = tuple(file for name in _GRAPHS for file in (f"{name}.onnx", binary_of(name)))
ESTIMATED = (*_CONTEXT_FILES, tables.DESCRIPTION)
# Of a context binary, beside its codes and scales; measured on models of 2 to 30 layers.
_BINARY, _BINARY_LAYER, _CONTEXT_MODEL, _DESCRIPTION_LAYER = 250_000, 110_000, 2_000, 700


class _Graphs(NamedTuple):
    """The float graph that is observed, and those that are compiled, by name."""

    observed: Static
    qdq: Mapping[str, Static]


def context_length(config: DecoderConfig) -> int:
    """Up to a window: one mask serves all layers."""
    return shortest_window(config)


def kv_cache(wanted: str) -> str:
    """Keys and values are int16: the NPU silently cuts uint16 ones to 8 bits."""
    return "i16"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if the NPU was not shown to compute this; DependencyMissing without SDK."""
    layout.layout(config, plan)
    if not (tokenizer.folder / _TOKENIZER).is_file():
        raise Unsupported(
            "the model has no tokenizer.json",
            "the runtime of the NPU has no tokenizer: an app reads tokenizer.json by itself",
            "save one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    sdk.require()


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """Raise Unsupported if the target names no processor that binaries are made for."""
    chip_of(deployment)


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}; to the byte, but for ESTIMATED."""
    placed = layout.layout(config, plan)
    graphs = _graphs(config, placed, deployment.context, _no_vectors(plan), None)
    properties = _properties("sha256:" + "0" * 64)
    qdq = {
        f"{_QDQ}/{graph}.onnx": len(static.graph.serialize(graph, properties))
        for graph, static in graphs.qdq.items()
    }
    held = sum(tensor.nbytes for tensor in placed.tensors)
    binary = held + _BINARY + _BINARY_LAYER * config.layers
    contexts = {f"{graph}.onnx": _CONTEXT_MODEL for graph in _GRAPHS}
    contexts |= {binary_of(graph): binary for graph in _GRAPHS}
    beside = {
        tables.TABLES: tables.tables_bytes(tables.tables(config, plan, deployment.context)),
        tables.DESCRIPTION: 4_000 + _DESCRIPTION_LAYER * config.layers,
        _TOKENIZER: (tokenizer.folder / _TOKENIZER).stat().st_size,
    }
    sizes = {**contexts, **beside, **qdq, f"{_QDQ}/{DATA}": placed.nbytes}
    return {file: sizes[file] for file in _files()}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes} of codes and scales in the graphs; of an embedding, in its table too."""
    placed = layout.layout(config, plan)
    found: dict[str, int] = {}
    for tensor in placed.tensors:
        (choice,) = tensor.choices
        found[choice.weight.name] = found.get(choice.weight.name, 0) + tensor.nbytes
    table = tables.tables(config, plan, 1)
    size = table[tables.CODES].nbytes + table[tables.SCALE].nbytes
    found[EMBEDDING] = found.get(EMBEDDING, 0) + size
    for choice in plan.choices:
        if not choice.weight.is_matrix:
            found[choice.weight.name] = 2 * choice.weight.shape[0]
    return found


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write the graphs, observe them on the calibration text, compile them, and fsync all files.

    Raises:
        Unsupported: as `refuse`.
        UsageError: no calibration text.
        ValidationFailed: the compiler leaves a part of a graph to the CPU.
    """
    if deployment.calibration is None:
        raise UsageError(
            "the NPU's integers need a calibration text",
            "their ranges are those of the activations on real text",
            "give a text with --calibration FILE",
        )
    chip = chip_of(deployment)
    config, context = model.decoder, deployment.context
    placed = layout.layout(config, model.plan)
    (folder / _QDQ).mkdir()
    write_aligned(folder / _QDQ / DATA, b"", packing.data(model, placed), ALIGNMENT)
    observed = calibration.observed_graph(config, placed, context, model.rows)
    ranges = calibration.observe(model, observed, folder / _QDQ, context, deployment.calibration)
    graphs = _graphs(config, placed, context, model.rows, ranges)
    encodings = calibration.encodings_of(graphs.observed, ranges)
    for name, static in graphs.qdq.items():
        content = static.graph.serialize(name, _properties(model.weights_digest))
        write_bytes(folder / _QDQ / f"{name}.onnx", content)
    places = tables.tables(config, model.plan, context)
    contents = tables.data(model, places, encodings, context)
    write_aligned(folder / tables.TABLES, b"", contents, ALIGNMENT)
    described = tables.description(
        config, model.plan, tokenizer, deployment, graphs.qdq["decode"], encodings
    )
    write_bytes(folder / tables.DESCRIPTION, described)
    write_bytes(folder / _TOKENIZER, (tokenizer.folder / _TOKENIZER).read_bytes())
    for name in _GRAPHS:
        compile_graph(folder, name, f"{_QDQ}/{name}.onnx", chip)
    sync_folder(folder)
    return [folder / name for name in _files()]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished files, by a reader that shares no code with the packer."""
    return reader.read_back(folder, config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code and scale with `model`, and some with ONNX Runtime's kernels."""
    return compare.check(model, folder)


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The plugin that was run here, with its own minimum."""
    return device.minimum_runtime()


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Sentences that whoever uses the files must know."""
    return [
        "The runtime has no tokenizer: the app must run tokenizer.json with the tokenizers library"
        " and render the chat template by itself."
    ]


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md: how to load it on the device, with code."""
    return device.readme(fields)


def _files() -> tuple[str, ...]:
    """Of the bundle, first the one that a runtime is given."""
    return (*_CONTEXT_FILES, tables.TABLES, tables.DESCRIPTION, _TOKENIZER, *PROOF)


def _graphs(
    config: DecoderConfig,
    placed: Layout,
    context: int,
    vectors: Vectors,
    ranges: Mapping[str, Range] | None,
) -> _Graphs:
    """All graphs; without ranges on encodings of no meaning, which have the same size."""
    observed = calibration.observed_graph(config, placed, context, vectors)
    known = dict.fromkeys(observed.names(), (0.0, 1.0)) if ranges is None else dict(ranges)
    encodings = calibration.encodings_of(observed, known)
    sizes = {"decode": 1, "prefill": layout.chunk_of(context)}
    qdq = {
        name: decoder_graph(config, placed, Size(tokens, context), vectors, encodings)
        for name, tokens in sizes.items()
    }
    return _Graphs(observed, qdq)


def _properties(digest: str) -> dict[str, str]:
    return {"slimport.weights_digest": digest}


def _no_vectors(plan: Plan) -> Vectors:
    shapes = {c.weight.name: c.weight.shape for c in plan.choices}
    return lambda name: np.zeros(shapes[name], np.float32)
