"""The range of every activation, observed on real text in the float graph."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...architectures import DecoderConfig, Kind, rotation
from ...quantize.grid import Float32
from ...quantize.store import QuantizedCheckpoint
from ...quantize.windows import Int32, Windows
from ..layout import Layout
from .decoder import COS, HIDDEN, MASK, MASKED, PAST_K, PAST_V, SIN, Size, Vectors, decoder_graph
from .encoding import Encodings, Range
from .layout import chunk_of
from .rolling import Array, Geometry, Inputs, Rolling
from .static import Static

WINDOWS = 16  # of the calibration text; more change nothing that shows in logits
# A range is widened by half of itself on both sides: what clips costs far more than half a bit of
# sixteen. Tiny random models on other text: KL 1e-3 without, 1e-5 with it.
_MARGIN = 1.5
_FOLDER = "session.model_external_initializers_file_folder_path"
_ROWS = 8192
ort.set_default_logger_severity(4)  # failures come as exceptions; their log lines are noise


def geometry_of(config: DecoderConfig, slots: int) -> Geometry:
    return Geometry(config.layers, config.heads, config.kv_heads, config.head_dim, slots)


def turns(config: DecoderConfig, slots: int) -> tuple[tuple[Float32, Float32], ...]:
    """Cosines and sines (slots, head_dim) of each rope, the first half of the sines negated.

    Columns that a rope does not turn are 1 and 0.
    """
    found = []
    for rope in config.ropes:
        cos, sin = rotation.turns(rope, config.head_dim, slots)
        kept = np.ones((slots, config.head_dim - rope.rotated(config.head_dim)), np.float32)
        halves = [cos, cos, kept], [-sin, sin, 0 * kept]
        found.append((np.concatenate(halves[0], 1), np.concatenate(halves[1], 1)))
    return tuple(found)


def observed_graph(config: DecoderConfig, placed: Layout, slots: int, vectors: Vectors) -> Static:
    """The float graph that observation runs, a prompt's chunk at a time."""
    return decoder_graph(config, placed, Size(chunk_of(slots), slots), vectors, None)


def encodings_of(graph: Static, ranges: dict[str, Range]) -> Encodings:
    """Encodings for every tensor of both graphs, from ranges of the float one."""
    return Encodings(ranges, graph.tied, graph.caches)


def fixed_ranges(config: DecoderConfig, embedded: Range) -> dict[str, Range]:
    """Of the inputs, which no text has to show; `embedded` is that of all embeddings."""
    found = {HIDDEN: embedded, MASK: (MASKED, 0.0)}
    for index, (cos, _) in enumerate(turns(config, 1)):
        largest = float(cos.max())  # at position 0 nothing is turned: the scale of the rope
        found |= {COS.format(index): (-largest, largest), SIN.format(index): (-largest, largest)}
    return found


def embedded_range(model: QuantizedCheckpoint) -> Range:
    """The smallest and the largest number of all embeddings."""
    config = model.decoder
    (table,) = (c.weight for c in model.plan.choices if c.weight.kind is Kind.EMBEDDING)
    low = high = 0.0
    for start in range(0, config.vocab_size, _ROWS):
        rows = model.rows(table.name, start, start + _ROWS)
        low, high = min(low, float(rows.min())), max(high, float(rows.max()))
    return low * config.embedding_multiplier, high * config.embedding_multiplier


def observe(
    model: QuantizedCheckpoint, graph: Static, folder: Path, slots: int, windows: Windows
) -> dict[str, Range]:
    """The range of every tensor: what the calibration text shows, and a margin.

    Args:
        graph: of `observed_graph`.
        folder: holds the data file.
    """
    config = model.decoder
    content = graph.graph.serialize("observed", {})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2  # the same sums whatever the machine has
    # Fused, int8 weights would be multiplied with int8 activations: another model.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_FOLDER, str(folder))
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = {name: tensor for name, tensor in graph.boundary.items() if name != tensor}
    ranges: dict[str, Range] = {}

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        found = dict(zip(names, session.run(names, feeds), strict=True))
        for name, values in found.items():
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(values.min())), max(high, float(values.max()))
        return {name: found[tensor] for name, tensor in results.items()}

    chunk = chunk_of(slots)
    inputs = _float_inputs(model, slots)
    geometry = geometry_of(config, slots)
    for window in _chosen(windows.ids, slots, chunk):
        for _ in Rolling(geometry, inputs, {chunk: run}).feed(window, chunk):
            pass
    past = [PAST_K.format(layer) for layer in range(config.layers)]
    past += [PAST_V.format(layer) for layer in range(config.layers)]
    widened = {name: (_MARGIN * low, _MARGIN * high) for name, (low, high) in ranges.items()}
    fixed = fixed_ranges(config, embedded_range(model))
    return widened | fixed | dict.fromkeys(past, (0.0, 0.0))


def _chosen(ids: Int32, slots: int, chunk: int) -> Int32:
    """Some windows, evenly spread, of whole chunks; shorter ones are repeated to fill one."""
    places = np.unique(np.linspace(0, len(ids) - 1, WINDOWS).astype(np.int64))
    length = max(chunk, min(ids.shape[1], slots) // chunk * chunk)
    return np.array([np.resize(window, length) for window in ids[places]], np.int32)


def _float_inputs(model: QuantizedCheckpoint, slots: int) -> Inputs:
    config = model.decoder
    (table,) = (c.weight for c in model.plan.choices if c.weight.kind is Kind.EMBEDDING)

    @cache
    def row(token: int) -> Float32:
        return model.rows(table.name, token, token + 1)

    def hidden(ids: Int32) -> Float32:
        found: Float32 = np.concatenate([row(int(token)) for token in ids])
        return found * np.float32(config.embedding_multiplier)

    return Inputs(hidden, turns(config, slots), 0.0, MASKED, "<f4", "<f4")
