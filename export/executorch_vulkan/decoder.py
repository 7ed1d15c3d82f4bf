"""The program of a whole decoder: tokens and their first position in, logits of the last token out.

Rows of the embedding are looked up on the CPU. All else is one graph on the GPU, which a loop of
the program gives a chunk of the prompt at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...architectures import DecoderConfig, Kind, Rope
from ..executorch import embedding
from ..executorch.decoder import FORWARD
from ..executorch.layout import GELU_BEND, GELU_CUBE
from ..executorch.program import LARGEST, Method
from ..executorch.subgraph import TOKENS, Tensor
from ..layout import Stored
from . import limits
from .graph import Graph, Number, Value
from .layout import Part, Placed, query_factor


def decoder_method(
    config: DecoderConfig, placed: Placed, context: int, keys: Mapping[str, str]
) -> Method:
    """The method `(tokens (1, n) int64, position (1,) int64) -> logits (1, 1, vocab) float32`.

    Args:
        context: tokens of a text and its continuation.
        keys: {stored tensor: its key in the file}.
    """
    chunk = limits.chunk_of(config, context)
    constants = {tensor.name: index for index, tensor in enumerate(placed.constants, 1)}
    method = Method(FORWARD, chunk, constants)
    tokens = method.input("int64", (1, TOKENS), longest=context)
    position = method.input("int64", (1,))
    start, end, count, done = method.number(), method.number(), method.number(), method.truth()
    method.call("aten::sym_size.int", tokens, 1, out=count)
    method.move(0, start)  # it keeps what it was from run to run
    again = method.here()
    method.call("executorch_prim::add.Scalar", start, chunk, out=end)
    operator = "aten::slice_copy.Tensor_out"
    some = method.made(operator, tokens, 1, start, end, 1, dtype="int64", shape=(1, TOKENS))
    first = method.made("aten::add.Scalar_out", position, start, 1, dtype="int64", shape=(1,))
    hidden = embedding.rows(method, placed.looked_up, some, config.hidden_size)
    graph = _Decoder(config, placed, Graph(chunk, keys), limits.room_of(context))
    (logits,) = method.delegate(graph.build(hidden, first))
    method.move(end, start)
    method.call("executorch_prim::ge.Scalar", start, count, out=done)
    method.jump_unless(done, again)
    method.output(logits)
    return method


class _Decoder:
    def __init__(self, config: DecoderConfig, placed: Placed, graph: Graph, room: int) -> None:
        self.config, self.placed, self.graph, self.room = config, placed, graph, room
        self.stored = placed.layout.by_name
        self.norms = dict(config.family.norms)

    def build(self, rows: Tensor, first: Tensor) -> Graph:
        """The graph of `rows` (1, n, hidden_size) of the embedding, `first` their position."""
        graph, config = self.graph, self.config
        stream, position = graph.input(rows), graph.number(first)
        stream = self.scaled(stream, config.embedding_multiplier)
        turns = {
            rope: [self.table(table) for table in pair]
            for rope, pair in zip(config.ropes, self.placed.tables, strict=True)
        }
        for layer in range(config.layers):
            x = self.normed(stream, layer, Kind.ATTENTION_NORM)
            x = self.attention(x, layer, position, turns)
            stream = self.add(stream, x, layer, Kind.ATTENTION_POST_NORM)
            x = self.normed(stream, layer, Kind.FFN_NORM)
            x = self.network(x, layer)
            stream = self.add(stream, x, layer, Kind.FFN_POST_NORM)
        last = (1, 1, config.hidden_size)
        stream = graph.op("aten.slice_copy.Tensor", stream, 1, -1, LARGEST, 1, shape=last)
        graph.output(self.logits(stream))
        return graph

    def table(self, stored: Stored) -> Value:
        """A constant as a tensor of the GPU: the operator of the rope takes nothing else."""
        made = self.graph.kept(*stored.shape)
        self.graph.call("et_vk.prepack.default", self.graph.constant(stored), made)
        return made

    def attention(
        self, x: Value, layer: int, position: Number, turns: Mapping[Rope, list[Value]]
    ) -> Value:
        """What attention makes of the stream: (1, n, hidden_size)."""
        config, graph = self.config, self.graph
        query, key, value = (self.matrix(x, layer, kind) for kind in (Kind.Q, Kind.K, Kind.V))
        query = self.heads(query, layer, "q_norm", config.heads)
        key = self.heads(key, layer, "k_norm", config.kv_heads)
        value = self.heads(value, layer, None, config.kv_heads)
        rope = config.attention(layer).rope
        if rope is not None:
            operator, shapes = "et_vk.apply_rotary_emb_hf.default", [query.shape, key.shape]
            query, key = graph.ops(operator, query, key, *turns[rope], position, shapes=shapes)
        query = self.scaled(query, query_factor(config))
        caches = [graph.kept(1, self.room, config.kv_heads, config.head_dim) for _ in range(2)]
        for state, cache in zip((key, value), caches, strict=True):
            graph.call("update_cache.default", state, cache, position, None)
        # No mask, no dropout, causal by itself; a scale, even its own, would not load.
        given = (query, *caches, position, None, None, None, None)
        mixed = graph.op("llama.custom_sdpa.default", *given, shape=query.shape)
        mixed = self.reshaped(mixed, 1, TOKENS, config.heads * config.head_dim)
        return self.matrix(mixed, layer, Kind.ATTENTION_OUTPUT)

    def heads(self, x: Value, layer: int, norm: str | None, count: int) -> Value:
        """(1, n, count, head_dim), normalized."""
        normalized = self.config.family.qk_norm if norm else None
        module = f"model.layers.{layer}.self_attn.{norm}"
        if normalized == "row":
            x = self.norm(x, module)
        x = self.reshaped(x, 1, TOKENS, count, self.config.head_dim)
        return self.norm(x, module) if normalized == "head" else x

    def network(self, x: Value, layer: int) -> Value:
        """What the feed-forward network makes of the stream."""
        gate, up = (self.matrix(x, layer, kind) for kind in (Kind.GATE, Kind.UP))
        return self.matrix(self.multiplied(self.activated(gate), up), layer, Kind.DOWN)

    def activated(self, x: Value) -> Value:
        if self.config.family.activation == "silu":
            return self.multiplied(x, self.unary("sigmoid", x))
        cube = self.multiplied(self.multiplied(x, x), x)
        inner = self.added(x, self.scaled(cube, GELU_CUBE))
        bent = self.unary("tanh", self.scaled(inner, GELU_BEND))
        raised = self.added(bent, self.number(1.0))
        return self.multiplied(self.scaled(x, 0.5), raised)

    def add(self, stream: Value, x: Value, layer: int, norm: Kind) -> Value:
        x = self.scaled(self.normed(x, layer, norm), self.config.residual_multiplier)
        return self.added(stream, x)

    def logits(self, x: Value) -> Value:
        config = self.config
        x = self.norm(x, "model.norm")
        x = self.matrix(x, None, Kind.EMBEDDING if config.tied else Kind.HEAD)
        x = self.scaled(x, 1 / config.logits_divisor)
        if config.logits_softcap is None:
            return x
        bent = self.unary("tanh", self.scaled(x, 1 / config.logits_softcap))
        return self.scaled(bent, config.logits_softcap)

    def normed(self, x: Value, layer: int, kind: Kind) -> Value:
        """The norm of a layer, or nothing where its family has none there."""
        if kind not in self.norms:
            return x
        return self.norm(x, f"model.layers.{layer}.{self.norms[kind]}")

    def norm(self, x: Value, module: str) -> Value:
        """x / sqrt(mean(x ** 2) + epsilon) * weight.

        With an offset it is the sum of two, so that the file has the weight as it is.
        """
        weight = self.stored[f"{module}.weight"]
        normal = self.normalized(x, weight)
        if not self.config.family.norm_offset:
            return normal
        return self.added(normal, self.normalized(x, self.placed.offsets[weight.shape[0]]))

    def normalized(self, x: Value, weight: Stored) -> Value:
        given = (x, self.graph.constant(weight), float(self.config.rms_norm_eps))
        return self.graph.op("et_vk.rms_norm.default", *given, shape=x.shape)

    def matrix(self, x: Value, layer: int | None, kind: Kind) -> Value:
        """The product with a weight, in as many parts as it has to be."""
        made = [self.product(x, part) for part in self.placed.parts[layer, kind]]
        if len(made) == 1:
            return made[0]
        shape = (*x.shape[:-1], sum(each.shape[-1] for each in made))
        return self.graph.op("aten.cat.default", made, -1, shape=shape)

    def product(self, x: Value, part: Part) -> Value:
        graph, shape = self.graph, (*x.shape[:-1], part.rows)
        weight = graph.constant(part.weight)
        bias = graph.constant(part.bias) if part.bias else None
        if part.scale is None:
            return graph.op("aten.linear.default", x, weight, bias, shape=shape)
        if part.group is None:
            scale = graph.constant(part.scale, part.rows)
            return graph.op("et_vk.linear_q8csw.default", x, weight, scale, bias, shape=shape)
        scale = graph.constant(part.scale)
        given = (x, weight, scale, part.group, bias)
        return graph.op("et_vk.linear_q4gsw.default", *given, shape=shape)

    def reshaped(self, x: Value, *shape: int) -> Value:
        return self.graph.op("aten.view_copy.default", x, shape, shape=shape)

    def multiplied(self, x: Value, other: Value) -> Value:
        return self.graph.op("aten.mul.Tensor", x, other, shape=x.shape)

    def added(self, x: Value, other: Value) -> Value:
        return self.graph.op("aten.add.Tensor", x, other, 1, shape=x.shape)

    def unary(self, operator: str, x: Value) -> Value:
        return self.graph.op(f"aten.{operator}.default", x, shape=x.shape)

    def scaled(self, x: Value, factor: float) -> Value:
        """x * factor; nothing is computed for 1."""
        return x if factor == 1 else self.multiplied(x, self.number(factor))

    def number(self, number: float) -> Value:
        return self.graph.constant(self.placed.numbers[number])
