"""The graph of a whole decoder, for every family of architectures/: ids in, logits or a score out.

Inputs and outputs of a language model have the names that onnxruntime-genai expects. Where adapters
may change a matrix the graph takes their factors (adapter.py); they are empty in a run without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ...architectures import SCORE as SCORE_WEIGHT
from ...architectures import DecoderConfig, Kind
from ..container import Deployment
from . import blocks
from .adapter import adapter_inputs
from .graph import CONTRIB, TYPES, Graph, Shape
from .layout import GraphLayout

INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
SCORE = "score"
_BATCH, _LENGTH, _PAST, _TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)

Cache = tuple[ir.Value | None, ir.Value | None]


def decoder_graph(
    config: DecoderConfig, layout: GraphLayout, deployment: Deployment, digest: str
) -> Graph:
    """The language model that `config` describes, over the tensors of `layout`.

    Args:
        digest: of its weights.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, [_BATCH, _LENGTH])
    mask = graph.input("attention_mask", INT64, [_BATCH, _TOTAL])
    dtype = layout.activations
    caches = [_cache_inputs(graph, config, layer, TYPES[dtype]) for layer in range(config.layers)]
    adapted = _Adapted(deployment.adapted, digest)
    build = _Decoder(graph, config, layout, adapted, _read_mask(graph, mask))
    normed = build.hidden(ids, caches)
    head = layout.matrices.get((None, Kind.HEAD), layout.matrices[None, Kind.EMBEDDING])
    logits = blocks.linear(graph, normed, head, layout)
    logits = blocks.scaled(graph, logits, 1 / config.logits_divisor, "logits.scaled", dtype)
    logits = blocks.capped(graph, logits, config.logits_softcap, "logits.capped", dtype)
    graph.output(logits, "logits", TYPES[dtype], [_BATCH, _LENGTH, config.vocab_size])
    for name, value in build.present:
        graph.output(value, name, TYPES[dtype], _cache_shape(config, _TOTAL))
    return graph


def reward_graph(config: DecoderConfig, layout: GraphLayout) -> Graph:
    """The reward model that `config` describes: one score for each text of a batch.

    A text is a row of ids, filled up at its end where the mask is 0. It is scored where
    transformers scores it: at its last token that is not the padding of config.json.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, [_BATCH, _LENGTH])
    mask = graph.input("attention_mask", INT64, [_BATCH, _LENGTH])
    adapted = _Adapted(frozenset(), "")
    build = _Decoder(graph, config, layout, adapted, _read_mask(graph, mask))
    normed = build.hidden(ids, [(None, None)] * config.layers)
    last = blocks.last_place(graph, ids, mask, config.pad_id, "score.place")
    (row,) = graph.op("GatherND", normed, last, name="score.row", batch_dims=1)
    weight = blocks.stored(graph, SCORE_WEIGHT, layout, layout.activations)
    (score,) = graph.op("Gemm", row, weight, name="score", transB=1)
    (score,) = graph.op("Squeeze", score, graph.integers(1), name="score.number")
    graph.output(score, SCORE, TYPES[layout.activations], [_BATCH])
    return graph


def _cache_shape(config: DecoderConfig, length: str) -> Shape:
    return [_BATCH, config.kv_heads, length, config.head_dim]


def _cache_inputs(
    graph: Graph, config: DecoderConfig, layer: int, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    shape = _cache_shape(config, _PAST)
    key, value = (graph.input(PAST.format(layer, part), dtype, shape) for part in ("key", "value"))
    return key, value


@dataclass(frozen=True, slots=True)
class _Positions:
    """Where the tokens of a run stand: int32 (batch,) of the last one, int32 () of all so far."""

    last: ir.Value
    total: ir.Value


def _read_mask(graph: Graph, mask: ir.Value) -> _Positions:
    (count,) = graph.op("ReduceSum", mask, graph.integers(1), name="positions.count", keepdims=0)
    (last,) = graph.op("Sub", count, graph.integers(1), name="positions.last")
    (last,) = graph.op("Cast", last, name="positions.last.int32", to=int(INT32))
    (total,) = graph.op("Shape", mask, name="positions.shape", start=1, end=2)
    (total,) = graph.op("Squeeze", total, name="positions.total")
    (total,) = graph.op("Cast", total, name="positions.total.int32", to=int(INT32))
    return _Positions(last, total)


@dataclass(frozen=True, slots=True)
class _Adapted:
    """The kinds of matrices that adapters may change, and the digest of what they are made for."""

    kinds: frozenset[Kind]
    digest: str


@dataclass(frozen=True, slots=True)
class _Stream:
    """The residual stream, and what is added to it when it is read next."""

    hidden: ir.Value
    added: ir.Value | None = None


class _Decoder:
    """The layers of a decoder, added to `graph` one after the other.

    `present` gathers the outputs of the cache.
    """

    def __init__(
        self,
        graph: Graph,
        config: DecoderConfig,
        layout: GraphLayout,
        adapted: _Adapted,
        positions: _Positions,
    ) -> None:
        self.graph, self.config, self.layout = graph, config, layout
        self.adapted, self.positions = adapted, positions
        self.present: list[tuple[str, ir.Value]] = []
        self.ropes = config.ropes
        self.norms = dict(config.family.norms)

    def hidden(self, ids: ir.Value, caches: Sequence[Cache]) -> ir.Value:
        """What the last norm gives for every token, (batch, length, hidden)."""
        table, factor = self.layout.matrices[None, Kind.EMBEDDING], self.config.embedding_multiplier
        name, dtype = "model.embed_tokens.scaled", self.layout.stream
        hidden = blocks.lookup(self.graph, ids, table, self.layout)
        stream = _Stream(blocks.scaled(self.graph, hidden, factor, name, dtype))
        for layer, cache in enumerate(caches):
            stream = self.layer(stream, layer, cache)
        return self.read(stream, "model.norm")[1]

    def layer(self, stream: _Stream, layer: int, cache: Cache) -> _Stream:
        root = f"model.layers.{layer}"

        def read(stream: _Stream, kind: Kind) -> tuple[_Stream, ir.Value]:
            return self.read(stream, f"{root}.{self.norms[kind]}" if kind in self.norms else None)

        def write(stream: _Stream, added: ir.Value, kind: Kind) -> _Stream:
            added = self.to_stream(added)
            if kind in self.norms:
                added = self.norm(added, f"{root}.{self.norms[kind]}")
            name, factor = f"{root}.{kind.value}.scaled", self.config.residual_multiplier
            added = blocks.scaled(self.graph, added, factor, name, self.layout.stream)
            return _Stream(stream.hidden, added)

        stream, inputs = read(stream, Kind.ATTENTION_NORM)
        stream = write(stream, self.attention(inputs, layer, cache), Kind.ATTENTION_POST_NORM)
        stream, inputs = read(stream, Kind.FFN_NORM)
        return write(stream, self.feed_forward(inputs, layer), Kind.FFN_POST_NORM)

    def read(self, stream: _Stream, norm: str | None) -> tuple[_Stream, ir.Value]:
        """The stream with nothing left to add, and its values after `norm` (None: as they are)."""
        hidden, added = stream.hidden, stream.added
        if norm is None:
            if added is not None:
                hidden = blocks.add(self.graph, hidden, added, f"{added.name}.added")
            return _Stream(hidden), self.from_stream(hidden)
        if added is None:
            return stream, self.from_stream(self.norm(hidden, norm))
        weight, epsilon = self.norm_weight(norm), self.config.rms_norm_eps
        hidden, normed = blocks.add_and_norm(self.graph, hidden, added, weight, epsilon, norm)
        return _Stream(hidden), self.from_stream(normed)

    def to_stream(self, x: ir.Value) -> ir.Value:
        """What a product made, in the type of the stream and its norms."""
        return self.graph.cast(x, self.layout.activations, self.layout.stream, str(x.name))

    def from_stream(self, x: ir.Value) -> ir.Value:
        """What a norm made, in the type of products and attention."""
        return self.graph.cast(x, self.layout.stream, self.layout.activations, str(x.name))

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        return blocks.rms_norm(
            self.graph, x, self.norm_weight(name), self.config.rms_norm_eps, name
        )

    def norm_weight(self, name: str) -> ir.Value:
        dtype, offset = self.layout.stream, self.config.family.norm_offset
        weight = blocks.stored(self.graph, f"{name}.weight", self.layout, dtype)
        if not offset:
            return weight
        raised = self.graph.real(offset, dtype)
        return blocks.add(self.graph, weight, raised, f"{name}.weight.raised")

    def linear(self, x: ir.Value, kind: Kind, layer: int) -> ir.Value:
        """A matrix of the layer, and the update of an adapter where adapters may change it."""
        matrix = self.layout.matrices[layer, kind]
        y = blocks.linear(self.graph, x, matrix, self.layout)
        if kind in self.adapted.kinds:
            names = adapter_inputs(matrix.name, self.adapted.digest)
            y = blocks.low_rank(self.graph, x, y, matrix, names, self.layout.activations)
        return y

    def attention(self, x: ir.Value, layer: int, cache: Cache) -> ir.Value:
        config, looks = self.config, self.config.attention(layer)
        name = f"model.layers.{layer}.self_attn"
        key: ir.Value | None
        value: ir.Value | None
        if (layer, Kind.QKV) in self.layout.matrices:
            query, key, value = self.linear(x, Kind.QKV, layer), None, None
        else:
            query, key, value = (self.linear(x, k, layer) for k in (Kind.Q, Kind.K, Kind.V))
            if config.family.qk_norm is not None:
                query = self.head_norm(query, f"{name}.q_norm", config.heads)
                key = self.head_norm(key, f"{name}.k_norm", config.kv_heads)
        tables: list[ir.Value | None] = [None, None]
        if looks.rope is not None:
            index = self.ropes.index(looks.rope)
            tables = [
                blocks.stored(self.graph, name, self.layout, self.layout.activations)
                for name in (f"rope.{index}.cos", f"rope.{index}.sin")
            ]
        mixed, *present = self.graph.op(
            "GroupQueryAttention",
            *(query, key, value, *cache, self.positions.last, self.positions.total, *tables),
            name=name,
            domain=CONTRIB,
            outputs=3,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            scale=config.attention_scale,
            softcap=config.attention_softcap or 0.0,
            local_window_size=-1 if looks.window is None else looks.window,
            do_rotary=int(looks.rope is not None),
            rotary_interleaved=0,
        )
        for part, value in zip(("key", "value"), present, strict=True):
            self.present.append((PRESENT.format(layer, part), value))
        return self.linear(mixed, Kind.ATTENTION_OUTPUT, layer)

    def head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """RMSNorm of each head, or of the whole row."""
        x = self.to_stream(x)
        if self.config.family.qk_norm == "row":
            return self.from_stream(self.norm(x, name))
        size = self.config.head_dim
        x = blocks.reshaped(self.graph, x, (heads, size), f"{name}.heads")
        x = blocks.reshaped(self.graph, self.norm(x, name), (heads * size,), f"{name}.row")
        return self.from_stream(x)

    def feed_forward(self, x: ir.Value, layer: int) -> ir.Value:
        name = f"model.layers.{layer}.mlp"
        if self.config.family.fused:
            gate, up = blocks.halves(
                self.graph, self.linear(x, Kind.GATE_UP, layer), f"{name}.split"
            )
        else:
            gate, up = (self.linear(x, kind, layer) for kind in (Kind.GATE, Kind.UP))
        activation = {"silu": blocks.silu, "gelu_tanh": blocks.gelu_tanh}
        gate = activation[self.config.family.activation](self.graph, gate, f"{name}.act")
        (inner,) = self.graph.op("Mul", gate, up, name=f"{name}.inner")
        return self.linear(inner, Kind.DOWN, layer)
