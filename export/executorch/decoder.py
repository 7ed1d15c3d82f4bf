"""The program of a whole decoder: tokens and their first position in, logits out.

Between the attention of one layer and that of the next lies one XNNPACK graph; attention itself
and the cache are ExecuTorch's custom kernels, as the stock runners of Android and iOS have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ...architectures import DecoderConfig, Kind, Rope
from ..layout import Matrix, Stored
from . import embedding
from .layout import GELU_BEND, GELU_CUBE, HIDDEN, Placed, masks, tensors_of
from .program import LARGEST, Method
from .subgraph import TOKENS, Subgraph, Tensor, Value

# {(layer, kind): a (rank, inputs) and b (outputs, rank)} of low-rank updates b @ a of matrices
Updates = Mapping[tuple[int | None, Kind], tuple[Stored, Stored]]
NO_UPDATES: Updates = MappingProxyType({})
FORWARD, ALL_LOGITS = "forward", "all_logits"
CHUNK = 64  # tokens of the longest run of ALL_LOGITS, whose result lies in memory


def decoder_method(
    config: DecoderConfig,
    placed: Placed,
    context: int,
    keys: Mapping[str, str],
    *,
    outside: bool = False,
    updates: Updates = NO_UPDATES,
    all_logits: bool,
) -> Method:
    """A method `(tokens (1, n) int64, position (1,) int64) -> logits (1, 1, vocab) float32`.

    Args:
        keys: of the tensors that XNNPACK reads, and of all others that lie outside.
        outside: whether the tensors of `placed` lie in another file.
        updates: of matrices, whose factors are among the keys too.
        all_logits: of every token, (1, n, vocab), and not of the last alone; n up to CHUNK.
    """
    constants: dict[str, int | str] = {
        tensor.name: keys[tensor.name] if outside else index
        for index, tensor in enumerate(placed.constants, 1)
    }
    if all_logits:
        method = Method(ALL_LOGITS, min(CHUNK, context), constants)
    else:
        method = Method(FORWARD, context, constants)
    _Decoder(method, config, placed, context, keys, updates).build(all_logits)
    return method


class _Decoder:
    def __init__(
        self,
        method: Method,
        config: DecoderConfig,
        placed: Placed,
        context: int,
        keys: Mapping[str, str],
        updates: Updates,
    ) -> None:
        self.method, self.config, self.placed = method, config, placed
        self.context, self.keys, self.updates = context, keys, updates
        self.stored = placed.layout.by_name
        self.norms = dict(config.family.norms)
        self.tokens = method.input("int64", (1, TOKENS))
        position = method.input("int64", (1,))
        self.start, count, self.end = (method.number() for _ in range(3))
        method.call("aten::_local_scalar_dense.", position, out=self.start)
        method.call("aten::sym_size.int", self.tokens, 1, out=count)
        method.call("executorch_prim::add.Scalar", self.start, count, out=self.end)
        self.turns: dict[Rope, tuple[Tensor, ...]] = {
            rope: tuple(self.rows(table) for table in pair)
            for rope, pair in zip(config.ropes, placed.tables, strict=True)
        }

        self.masked = masks(config, context)
        self.masks = {seen: self.mask(seen) for seen in sorted({*self.masked.values()})}

    def build(self, all_logits: bool) -> None:
        method, config = self.method, self.config
        looked_up = self.placed.looked_up
        hidden = embedding.rows(method, looked_up, self.tokens, config.hidden_size)
        mixed: Tensor | None = None
        for layer in range(config.layers):
            graph, stream = self.graph(hidden, mixed, layer)
            rope = config.attention(layer).rope
            turns = [graph.input(table) for table in self.turns[rope]] if rope else []
            states = self.attended(graph, stream, layer, turns)
            if graph.computes(stream):
                graph.output(stream, *states)
                hidden, *parts = method.delegate(graph)
            else:
                graph.output(*states)
                parts = method.delegate(graph)
            mixed = self.attention(parts, layer)
        graph, stream = self.graph(hidden, mixed, config.layers)
        graph.output(stream)
        (hidden,) = method.delegate(graph)
        if not all_logits:
            shape = (1, 1, config.hidden_size)
            operator = "aten::slice_copy.Tensor_out"
            hidden = method.made(operator, hidden, 1, -1, LARGEST, 1, shape=shape)
        graph = self.new_graph()
        graph.output(self.logits(graph, graph.input(hidden)))
        method.output(*method.delegate(graph))

    def new_graph(self) -> Subgraph:
        return Subgraph(self.method.tokens, self.keys)

    def graph(self, hidden: Tensor, mixed: Tensor | None, layer: int) -> tuple[Subgraph, Value]:
        """A graph that begins with what is left of the layer before, and the stream after it."""
        graph = self.new_graph()
        stream = graph.input(hidden)
        if mixed is None:
            return graph, self.scaled(graph, stream, self.config.embedding_multiplier)
        return graph, self.rest(graph, stream, graph.input(mixed), layer - 1)

    def rows(self, table: Stored) -> Tensor:
        """Those of the positions of a run."""
        held = self.method.constant(table)
        operator, shape = "aten::slice_copy.Tensor_out", (TOKENS, *table.shape[1:])
        return self.method.made(operator, held, 0, self.start, self.end, 1, shape=shape)

    def mask(self, seen: int) -> Tensor:
        """(n, context): 0 where a token sees a position, a large negative number elsewhere."""
        positions = self.placed.positions
        assert positions is not None, "layout places them where masks are needed"
        graph = self.new_graph()
        token = graph.input(self.rows(positions))
        other = graph.reshaped(graph.input(self.method.constant(positions)), 1, self.context)
        ahead = graph.op("XNNSubtract", token, other)
        zero = self.number(graph, 0.0)
        early = graph.op("XNNSubtract", self.number(graph, float(seen - 1)), ahead)
        outside = graph.op(
            "XNNAdd", graph.op("XNNMinimum", ahead, zero), graph.op("XNNMinimum", early, zero)
        )
        graph.output(self.scaled(graph, outside, HIDDEN))
        return self.method.delegate(graph)[0]

    def attention(self, states: list[Tensor], layer: int) -> Tensor:
        """What the heads mix: (1, n, heads, head_dim)."""
        method, config = self.method, self.config
        query, *new = states
        shape = (1, self.context, config.kv_heads, config.head_dim)
        keys, values = (method.buffer("float32", shape) for _ in new)
        for state, cache in zip(new, (keys, values), strict=True):
            method.made("llama::update_cache.out", state, cache, self.start, shape=(1,))
        mask = self.masks[self.masked[layer]] if layer in self.masked else None
        if config.attention_softcap is not None:
            return self.capped_attention(query, keys, values, mask)
        settings = (self.start, mask, 0.0, mask is None, float(config.attention_scale))
        given = (query, keys, values, *settings)
        return method.made("llama::custom_sdpa.out", *given, shape=query.shape)

    def capped_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention over the whole cache with capped scores, which no kernel computes."""
        config, graph = self.config, self.new_graph()
        assert mask is not None and config.attention_softcap is not None
        groups, size, cap = config.kv_heads, config.head_dim, config.attention_softcap
        shared = config.heads // groups
        x = graph.reshaped(graph.input(query), TOKENS, groups, shared, size)
        x = graph.reshaped(graph.transposed(x, 1, 2, 0, 3), groups, shared * TOKENS, size)
        k, v = (
            graph.reshaped(graph.input(cache), self.context, groups, size)
            for cache in (keys, values)
        )
        k, v = (graph.transposed(past, 1, 0, 2) for past in (k, v))
        scores = graph.matrices(x, k, transposed=True)
        scores = self.scaled(graph, scores, config.attention_scale / cap)
        scores = self.scaled(graph, graph.op("XNNTanh", scores), cap)
        scores = graph.reshaped(scores, groups, shared, TOKENS, self.context)
        shares = graph.op("XNNSoftmax", graph.op("XNNAdd", scores, graph.input(mask)))
        shares = graph.reshaped(shares, groups, shared * TOKENS, self.context)
        x = graph.reshaped(graph.matrices(shares, v), groups, shared, TOKENS, size)
        graph.output(graph.reshaped(graph.transposed(x, 2, 0, 1, 3), 1, TOKENS, config.heads, size))
        return self.method.delegate(graph)[0]

    def attended(
        self, graph: Subgraph, stream: Value, layer: int, turns: Sequence[Value]
    ) -> list[Value]:
        """Query, key and value (1, n, heads, head_dim), rotated."""
        config = self.config
        x = self.normed(graph, stream, layer, Kind.ATTENTION_NORM)
        counts = (config.heads, config.kv_heads, config.kv_heads)
        sizes = [count * config.head_dim for count in counts]
        kinds = (Kind.Q, Kind.K, Kind.V)
        parts = self.split(graph, x, layer, Kind.QKV, kinds, sizes)
        found = []
        for part, count, norm in zip(parts, counts, (Kind.Q_NORM, Kind.K_NORM, None), strict=True):
            x = self.heads(graph, part, count, layer, norm)
            found.append(self.rotated(graph, x, turns) if norm and turns else x)
        return found

    def heads(self, graph: Subgraph, x: Value, count: int, layer: int, norm: Kind | None) -> Value:
        """(1, n, count, head_dim), normalized."""
        kind = self.config.family.qk_norm if norm else None
        module = f"model.layers.{layer}.self_attn.{'q_norm' if norm is Kind.Q_NORM else 'k_norm'}"
        if kind == "row":
            x = self.norm(graph, x, module)
        x = graph.reshaped(x, 1, TOKENS, count, self.config.head_dim)
        return self.norm(graph, x, module) if kind == "head" else x

    def rotated(self, graph: Subgraph, x: Value, turns: Sequence[Value]) -> Value:
        """Pairs of the first and second half of what turns; what is left stays as it is."""
        cos, sin = turns
        half = cos.shape[-1]
        first, second = graph.part(x, 0, half), graph.part(x, half, 2 * half)

        def product(part: Value, table: Value) -> Value:
            return graph.op("XNNMultiply", part, table)

        turned = graph.joined(
            graph.op("XNNSubtract", product(first, cos), product(second, sin)),
            graph.op("XNNAdd", product(second, cos), product(first, sin)),
        )
        if 2 * half == x.shape[-1]:
            return turned
        return graph.joined(turned, graph.part(x, 2 * half, x.shape[-1]))

    def rest(self, graph: Subgraph, stream: Value, mixed: Value, layer: int) -> Value:
        """The stream after a layer, from what its heads mixed."""
        config = self.config
        mixed = graph.reshaped(mixed, 1, TOKENS, config.heads * config.head_dim)
        added = self.matrix(graph, mixed, layer, Kind.ATTENTION_OUTPUT)
        stream = self.add(graph, stream, added, layer, Kind.ATTENTION_POST_NORM)
        x = self.normed(graph, stream, layer, Kind.FFN_NORM)
        sizes = [config.intermediate_size] * 2
        gate, up = self.split(graph, x, layer, Kind.GATE_UP, (Kind.GATE, Kind.UP), sizes)
        inner = graph.op("XNNMultiply", self.activated(graph, gate), up)
        added = self.matrix(graph, inner, layer, Kind.DOWN)
        return self.add(graph, stream, added, layer, Kind.FFN_POST_NORM)

    def add(self, graph: Subgraph, stream: Value, added: Value, layer: int, norm: Kind) -> Value:
        added = self.normed(graph, added, layer, norm)
        added = self.scaled(graph, added, self.config.residual_multiplier)
        return graph.op("XNNAdd", stream, added)

    def activated(self, graph: Subgraph, x: Value) -> Value:
        if self.config.family.activation == "silu":
            return graph.op("XNNMultiply", x, graph.op("XNNSigmoid", x))
        cube = graph.op("XNNMultiply", graph.op("XNNSquare", x), x)
        inner = graph.op("XNNAdd", x, self.scaled(graph, cube, GELU_CUBE))
        bent = graph.op("XNNTanh", self.scaled(graph, inner, GELU_BEND))
        raised = graph.op("XNNAdd", bent, self.number(graph, 1.0))
        return graph.op("XNNMultiply", self.scaled(graph, x, 0.5), raised)

    def logits(self, graph: Subgraph, hidden: Value) -> Value:
        config = self.config
        x = self.norm(graph, hidden, "model.norm")
        kind = Kind.EMBEDDING if config.tied else Kind.HEAD
        x = self.matrix(graph, x, None, kind)
        x = self.scaled(graph, x, 1 / config.logits_divisor)
        if config.logits_softcap is None:
            return x
        bent = graph.op("XNNTanh", self.scaled(graph, x, 1 / config.logits_softcap))
        return self.scaled(graph, bent, config.logits_softcap)

    def split(
        self,
        graph: Subgraph,
        x: Value,
        layer: int,
        fused: Kind,
        kinds: Iterable[Kind],
        sizes: list[int],
    ) -> list[Value]:
        """What matrices of `sizes` outputs make of x, or one matrix that holds all their rows."""
        if not self.config.family.fused:
            return [self.matrix(graph, x, layer, kind) for kind in kinds]
        made, start, parts = self.matrix(graph, x, layer, fused), 0, []
        for size in sizes:
            parts.append(graph.part(made, start, start + size))
            start += size
        return parts

    def normed(self, graph: Subgraph, x: Value, layer: int, kind: Kind) -> Value:
        """The norm of a layer, or nothing where its family has none there."""
        if kind not in self.norms:
            return x
        return self.norm(graph, x, f"model.layers.{layer}.{self.norms[kind]}")

    def norm(self, graph: Subgraph, x: Value, module: str) -> Value:
        """x / sqrt(mean(x ** 2) + epsilon) * weight."""
        mean = graph.mean(graph.op("XNNSquare", x))
        raised = graph.op("XNNAdd", mean, self.number(graph, self.config.rms_norm_eps))
        normal = graph.op("XNNMultiply", x, graph.op("XNNReciprocalSquareRoot", raised))
        weight = self.vector(graph, self.stored[f"{module}.weight"])
        if self.config.family.norm_offset:
            weight = graph.op("XNNAdd", weight, self.number(graph, self.config.family.norm_offset))
        return graph.op("XNNMultiply", normal, weight)

    def scaled(self, graph: Subgraph, x: Value, factor: float) -> Value:
        """x * factor; nothing is computed for 1."""
        return x if factor == 1 else graph.op("XNNMultiply", x, self.number(graph, factor))

    def number(self, graph: Subgraph, number: float) -> Value:
        return self.vector(graph, self.placed.numbers[number])

    def vector(self, graph: Subgraph, tensor: Stored) -> Value:
        """A few numbers of the file that the graph adds or multiplies by."""
        return graph.input(self.method.constant(tensor))

    def matrix(self, graph: Subgraph, x: Value, layer: int | None, kind: Kind) -> Value:
        """The product with a weight, and what an adapter adds to it."""
        made = self.base(graph, x, layer, kind)
        if (layer, kind) not in self.updates:
            return made
        first, second = (graph.weight(factor) for factor in self.updates[layer, kind])
        return graph.op("XNNAdd", made, graph.product(graph.product(x, first), second))

    def base(self, graph: Subgraph, x: Value, layer: int | None, kind: Kind) -> Value:
        matrix: Matrix = self.placed.layout.matrices[layer, kind]
        bias = None
        if matrix.bias:
            bias = graph.weight(self.stored[matrix.bias[0].weight.name])
        held = [self.stored[tensor.name] for tensor in tensors_of(matrix)]
        if matrix.grid is None:
            return graph.product(x, graph.weight(held[0]), bias)
        codes, scale = held
        return graph.quantized_product(x, codes, scale, matrix.grid.group, bias)
