"""The decoder as an ML Program of flexible lengths, for the GPU and the CPU.

Inputs, outputs and states have the names that Hugging Face's swift-transformers gives them. Numbers
are float16, but for norms and what they read, which are float32 inside: a square of 256 would not
fit. Heads that share keys and values are laid side by side along the queries, so that neither is
repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...architectures import DecoderConfig, Kind, Rope
from ...quantize.grid import GRIDS
from ..container import Deployment
from ..layout import Layout, Stored
from .layout import LEVELS, ROPE, Ios, form_of, zeros_of
from .program import CASTS, FLOAT16, FLOAT32, INT32, Flexible, Function, Shape, Value

IDS, LOGITS = "inputIds", "logits"
FULL, SLIDING = "fullAttentionMask", "slidingAttentionMask"
KEYS, VALUES = "keyCache", "valueCache"


def decoder_function(
    config: DecoderConfig, layout: Layout, deployment: Deployment, release: Ios
) -> Function:
    """The function `(ids (1, n), masks (1, 1, n, total)) -> logits (1, n, vocab)`.

    The ids are the last n of `total` tokens; keys and values of those before are in the states.
    """
    return _Decoder(config, layout, deployment.context, Function(release.opset)).build()


def windowed(config: DecoderConfig, layer: int, context: int) -> bool:
    """Whether a layer sees less of a text of `context` tokens than all that came before."""
    window = config.attention(layer).window
    return window is not None and window < context


def masks(config: DecoderConfig, context: int) -> dict[bool, int | None]:
    """{whether it is for windows: the window} of the masks that layers need."""
    return {
        windowed(config, layer, context): config.attention(layer).window
        if windowed(config, layer, context)
        else None
        for layer in range(config.layers)
    }


class _Decoder:
    def __init__(
        self, config: DecoderConfig, layout: Layout, context: int, function: Function
    ) -> None:
        self.config, self.layout, self.context = config, layout, context
        self.function = function
        self.stream = FLOAT32 if config.family.scaled_embedding else FLOAT16
        self.norms = dict(config.family.norms)
        self.weights: dict[str, Value] = {}

    def build(self) -> Function:
        function, config = self.function, self.config
        ids = function.input(IDS, INT32, Flexible(((1, 1), (1, self.context))))
        self.masks = self.given_masks()
        shape = (config.layers, 1, config.kv_heads, self.context, config.head_dim)
        self.caches = [function.state(name, *shape) for name in (KEYS, VALUES)]
        self.positions(next(iter(self.masks.values())))
        turns = {rope: self.turns(index) for index, rope in enumerate(config.ropes)}
        stream = self.embedded(ids)
        for layer in range(config.layers):
            x = self.normed(stream, layer, Kind.ATTENTION_NORM)
            x = self.attention(x, layer, turns)
            stream = self.add(stream, x, layer, Kind.ATTENTION_POST_NORM)
            x = self.normed(stream, layer, Kind.FFN_NORM)
            x = self.network(x, layer)
            stream = self.add(stream, x, layer, Kind.FFN_POST_NORM)
        function.output(self.logits(stream))
        return function

    def given_masks(self) -> dict[bool, Value]:
        """{whether it is for windows: what is added to scores}, as far as layers need them."""
        sizes = Flexible(((1, 1), (1, 1), (1, self.context), (1, self.context)))
        return {
            sliding: self.function.input(SLIDING if sliding else FULL, FLOAT16, sizes)
            for sliding in sorted(masks(self.config, self.context))
        }

    def positions(self, mask: Value) -> None:
        """Where the ids stand: int32 (1,) each, the first of them and the one after the last."""
        sizes = self.function.op("shape", "mask_sizes", (4,), INT32, x=mask)
        length, self.total = (
            self.function.op(
                "slice_by_index", name, (1,), INT32, x=sizes, begin=[place], end=[place + 1]
            )
            for name, place in (("length", 2), ("total", 3))
        )
        self.start = self.function.op("sub", "start", (1,), INT32, x=self.total, y=length)
        self.repeated = {}
        shared = self.config.heads // self.config.kv_heads
        for sliding, mask in self.masks.items():
            name = f"{mask.name}_of_groups"
            self.repeated[sliding] = self.joined(name, [mask] * shared, 2) if shared > 1 else mask

    def turns(self, index: int) -> tuple[Value, Value]:
        """Cosines of a rope, and sines of which the first half is negated: (1, 1, n, rotated)."""
        cos, sin = (self.rows_of(self.layout.by_name[f"{ROPE}{index}.{h}"]) for h in ("cos", "sin"))
        name = f"rope_{index}"
        negated = self.scaled(f"{name}_negated", sin, -1.0)
        wide_cos = self.joined(f"{name}_cosines", [cos, cos], -1)
        return wide_cos, self.joined(f"{name}_sines", [negated, sin], -1)

    def rows_of(self, table: Stored) -> Value:
        """The rows of a table at the positions of the ids, in float16."""
        function, name = self.function, table.name.replace(".", "_")
        whole = function.stored(table, name)
        zeros, rest = [0, 0], [0]
        begin = self.joined(f"{name}_begin", [zeros, self.start, rest], 0)
        end = self.joined(f"{name}_end", [zeros, self.total, rest], 0)
        rows = function.op(
            "slice_by_index",
            f"{name}_rows",
            (1, 1, None, table.shape[3]),
            FLOAT32,
            x=whole,
            begin=begin,
            end=end,
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
        )
        return self.cast(f"{name}_half", rows, FLOAT16)

    def embedded(self, ids: Value) -> Value:
        table = self.weight(None, Kind.EMBEDDING)
        rows = self.function.op(
            "gather",
            "embedded",
            (1, None, self.config.hidden_size),
            table.dtype,
            x=table,
            indices=ids,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )
        rows = self.cast("embedded_as_stream", rows, self.stream)
        return self.scaled("embedded_scaled", rows, self.config.embedding_multiplier)

    def attention(self, x: Value, layer: int, turns: Mapping[Rope, tuple[Value, Value]]) -> Value:
        """What attention makes of the stream: (1, n, hidden_size)."""
        config, name = self.config, f"layers_{layer}_attention"
        query, key, value = self.queries_keys_values(x, layer)
        query = self.heads(f"{name}_query", query, layer, "q_norm", config.heads)
        key = self.heads(f"{name}_key", key, layer, "k_norm", config.kv_heads)
        value = self.heads(f"{name}_value", value, layer, None, config.kv_heads)
        rope = config.attention(layer).rope
        if rope is not None:
            query = self.turned(f"{name}_query", query, *turns[rope])
            key = self.turned(f"{name}_key", key, *turns[rope])
        query = self.scaled(f"{name}_query_scaled", query, self.query_factor())
        keys, values = (
            self.kept(f"{name}_{what}", cache, new, layer)
            for what, cache, new in zip(("keys", "values"), self.caches, (key, value), strict=True)
        )
        size = config.head_dim
        query = self.reshaped(f"{name}_query_groups", query, 1, config.kv_heads, -1, size)
        mask = self.repeated[windowed(config, layer, self.context)]
        mixed = self.mixed(name, query, keys, values, mask)
        mixed = self.reshaped(f"{name}_heads", mixed, 1, config.heads, -1, size)
        mixed = self.transposed(f"{name}_rows", mixed, 0, 2, 1, 3)
        mixed = self.reshaped(f"{name}_joined", mixed, 1, -1, config.heads * size)
        return self.linear(mixed, layer, Kind.ATTENTION_OUTPUT)

    def queries_keys_values(self, x: Value, layer: int) -> list[Value]:
        config = self.config
        if not config.family.fused:
            return [self.linear(x, layer, kind) for kind in (Kind.Q, Kind.K, Kind.V)]
        sizes = [count * config.head_dim for count in (config.heads, *(config.kv_heads,) * 2)]
        return self.parts(self.linear(x, layer, Kind.QKV), sizes)

    def mixed(self, name: str, query: Value, keys: Value, values: Value, mask: Value) -> Value:
        """Values weighted by the softmax of masked scores: (1, kv_heads, heads x n, head_dim)."""
        function, cap = self.function, self.config.attention_softcap
        if cap is None:
            given = {"query": query, "key": keys, "value": values, "attn_mask": mask}
            return function.op("scaled_dot_product_attention", name, query.shape, **given)
        shape = (*query.shape[:-1], None)
        scores = self.product(f"{name}_scores", query, keys, shape, across=True)
        scores = self.capped(f"{name}_scores", scores, cap)
        scores = function.op("add", f"{name}_masked", shape, x=scores, y=mask)
        shares = function.op("softmax", f"{name}_shares", shape, x=scores, axis=-1)
        return self.product(name, shares, values, query.shape)

    def product(self, name: str, x: Value, y: Value, shape: Shape, across: bool = False) -> Value:
        """x @ y; `across`: x @ y.T."""
        return self.function.op(
            "matmul", name, shape, x=x, y=y, transpose_x=False, transpose_y=across
        )

    def query_factor(self) -> float:
        """What queries are multiplied by: attention itself divides scores by sqrt(head_dim)."""
        factor = self.config.attention_scale
        if self.config.attention_softcap is None:
            factor *= self.config.head_dim**0.5
        return 1.0 if abs(factor - 1) < _SAME else factor

    def heads(self, name: str, x: Value, layer: int, norm: str | None, count: int) -> Value:
        """(1, count, n, head_dim), normalized."""
        normalized = self.config.family.qk_norm if norm else None
        module = f"model.layers.{layer}.self_attn.{norm}"
        if normalized == "row":
            x = self.norm(x, module)
        x = self.reshaped(f"{name}_split", x, 1, -1, count, self.config.head_dim)
        x = self.norm(x, module) if normalized == "head" else x
        return self.transposed(f"{name}_heads", x, 0, 2, 1, 3)

    def turned(self, name: str, x: Value, cos: Value, sin: Value) -> Value:
        """Heads with their first numbers rotated in halves, as many as the tables are wide."""
        width, size = cos.shape[-1], x.shape[-1]
        assert width is not None and size is not None, "tables and heads have fixed widths"
        first, second = (
            self.part(f"{name}_{which}_half", x, start, start + width // 2)
            for which, start in (("first", 0), ("second", width // 2))
        )
        swapped = self.joined(f"{name}_swapped", [second, first], -1)
        kept = self.part(f"{name}_turning", x, 0, width) if width < size else x
        turned = self.two(
            "add",
            f"{name}_turned",
            *(
                self.two("mul", f"{name}_{by}", each, table)
                for by, each, table in (("cosines", kept, cos), ("sines", swapped, sin))
            ),
        )
        if width == size:
            return turned
        rest = self.part(f"{name}_rest", x, width, size)
        return self.joined(f"{name}_whole", [turned, rest], -1)

    def kept(self, name: str, cache: Value, new: Value, layer: int) -> Value:
        """What a cache holds of all tokens so far, the new ones too."""
        config, function = self.config, self.function
        before, after = [layer, 0, 0], [layer + 1, 1, config.kv_heads]
        begin = self.joined(f"{name}_begin", [before, self.start, [0]], 0)
        end = self.joined(f"{name}_end", [after, self.total, [config.head_dim]], 0)
        held = function.read(cache, f"{name}_before")
        update = function.op("expand_dims", f"{name}_new", (1, *new.shape), x=new, axes=[0])
        given = {"x": held, "update": update, "begin": begin, "end": end}
        function.write(cache, function.op("slice_update", f"{name}_updated", cache.shape, **given))
        return self.so_far(name, function.read(cache, f"{name}_after"), layer)

    def so_far(self, name: str, cache: Value, layer: int) -> Value:
        """What a cache holds of one layer, up to the last token: (1, kv_heads, total, head_dim).

        In two steps, as a type is only found for sizes that are constants or left out by a mask.
        """
        function, config = self.function, self.config
        sizes = [1, config.kv_heads, self.context, config.head_dim]
        whole = function.op(
            "slice_by_index",
            f"{name}_of_layer",
            tuple(sizes),
            x=cache,
            begin=[layer, 0, 0, 0, 0],
            end=[layer + 1, *sizes],
            end_mask=[False, True, True, True, True],
            squeeze_mask=[True, False, False, False, False],
        )
        end = self.joined(f"{name}_total", [sizes[:2], self.total, sizes[3:]], 0)
        return function.op(
            "slice_by_index",
            f"{name}_so_far",
            (*sizes[:2], None, *sizes[3:]),
            x=whole,
            begin=[0, 0, 0, 0],
            end=end,
            end_mask=[True, True, False, True],
        )

    def network(self, x: Value, layer: int) -> Value:
        """What the feed-forward network makes of the stream."""
        config, name = self.config, f"layers_{layer}_network"
        if config.family.fused:
            gate, up = self.parts(
                self.linear(x, layer, Kind.GATE_UP), [config.intermediate_size] * 2
            )
        else:
            gate, up = (self.linear(x, layer, kind) for kind in (Kind.GATE, Kind.UP))
        if config.family.activation == "silu":
            gate = self.function.op("silu", f"{name}_gate", gate.shape, x=gate)
        else:
            mode = "TANH_APPROXIMATION"
            gate = self.function.op("gelu", f"{name}_gate", gate.shape, x=gate, mode=mode)
        return self.linear(self.two("mul", f"{name}_inner", gate, up), layer, Kind.DOWN)

    def add(self, stream: Value, x: Value, layer: int, norm: Kind) -> Value:
        name = f"layers_{layer}_{norm.value}"
        x = self.normed(x, layer, norm, self.stream)
        x = self.cast(f"{name}_as_stream", x, self.stream)
        x = self.scaled(f"{name}_scaled", x, self.config.residual_multiplier)
        return self.two("add", f"{name}_added", stream, x)

    def logits(self, x: Value) -> Value:
        config = self.config
        x = self.norm(x, "model.norm")
        last = config.logits_divisor == 1 and config.logits_softcap is None
        kind = Kind.EMBEDDING if config.tied else Kind.HEAD
        x = self.linear(x, None, kind, LOGITS if last else "head")
        if config.logits_softcap is None:
            return self.scaled(LOGITS, x, 1 / config.logits_divisor)
        x = self.scaled("head_scaled", x, 1 / config.logits_divisor)
        return self.capped("head", x, config.logits_softcap, LOGITS)

    def normed(self, x: Value, layer: int, kind: Kind, dtype: str = FLOAT16) -> Value:
        """The norm of a layer, or nothing where its family has none there."""
        if kind not in self.norms:
            return self.cast(f"layers_{layer}_{kind.value}_none", x, dtype)
        return self.norm(x, f"model.layers.{layer}.{self.norms[kind]}", dtype)

    def norm(self, x: Value, module: str, dtype: str = FLOAT16) -> Value:
        """x / sqrt(mean(x ** 2) + epsilon) * (weight + offset), computed in float32."""
        function, name = self.function, _name(module)
        x = self.cast(f"{name}_wide", x, FLOAT32)
        square = self.two("mul", f"{name}_square", x, x)
        one = (*x.shape[:-1], 1)
        mean = function.op(
            "reduce_mean", f"{name}_mean", one, FLOAT32, x=square, axes=[-1], keep_dims=True
        )
        epsilon = np.float32(self.config.rms_norm_eps)
        factor = function.op("rsqrt", f"{name}_factor", one, FLOAT32, x=mean, epsilon=epsilon)
        x = self.two("mul", f"{name}_normal", x, factor)
        weight = self.stored(f"{module}.weight")
        offset = self.config.family.norm_offset
        if offset:
            number, shape = np.float32(offset), weight.shape
            weight = function.op("add", f"{name}_raised", shape, FLOAT32, x=weight, y=number)
        return self.cast(f"{name}_half", self.two("mul", name, x, weight), dtype)

    def linear(self, x: Value, layer: int | None, kind: Kind, name: str = "") -> Value:
        """The product with a weight, and its bias; in float16."""
        matrix = self.layout.matrices[layer, kind]
        weight, function = self.weight(layer, kind), self.function
        name, rows = name or _name(matrix.name), matrix.shape[0]
        nothing = self.stored(zeros_of(matrix))
        given = {"x": self.cast(f"{name}_input", x, weight.dtype), "weight": weight}
        exact = weight.dtype == x.dtype
        product = name if exact and not matrix.bias else f"{name}_product"
        shape = (*x.shape[:-1], rows)
        x = function.op("linear", product, shape, weight.dtype, **given, bias=nothing)
        x = self.cast(f"{name}_half" if matrix.bias else name, x, FLOAT16)
        if not matrix.bias:
            return x
        bias = self.stored(matrix.bias[0].weight.name)
        return self.two("add", name, x, self.cast(f"{bias.name}_half", bias, FLOAT16))

    def weight(self, layer: int | None, kind: Kind) -> Value:
        """A matrix that the device decompresses; a tied one is made once."""
        matrix = self.layout.matrices[layer, kind]
        if matrix.name not in self.weights:
            self.weights[matrix.name] = self.decompressed(layer, kind)
        return self.weights[matrix.name]

    def decompressed(self, layer: int | None, kind: Kind) -> Value:
        matrix, held = self.layout.matrices[layer, kind], self.layout.by_name
        (choice,), function = matrix.choices, self.function
        name = _name(choice.weight.name)
        if choice.grid is None:
            return function.stored(held[choice.weight.name], name)
        form, codes = form_of(choice), held[f"{matrix.name}.codes"]
        scale = held[f"{matrix.name}.scale"]
        dtype = FLOAT16 if form.scale == "<f2" else FLOAT32
        data: Stored | Value = codes
        if form.levels is not None:
            data = function.decompressed(
                "constexpr_lut_to_dense",
                f"{name}_levels",
                codes.shape,
                "INT8" if form.levels == "|i1" else FLOAT32,
                indices=codes,
                lut=self.levels(choice.grid.name),
            )
        given = {"data": data, "scale": scale}
        kind_of = "constexpr_blockwise_shift_scale"
        return function.decompressed(kind_of, name, codes.shape, dtype, **given)

    def levels(self, grid: str) -> Stored | np.ndarray:
        if f"{LEVELS}{grid}" in self.layout.by_name:
            return self.layout.by_name[f"{LEVELS}{grid}"]
        low, high = GRIDS[grid].low, GRIDS[grid].high
        return np.arange(low, high + 1, dtype=np.int8).reshape(1, 1, -1, 1)

    def stored(self, name: str) -> Value:
        """A tensor of the weight file, made once."""
        if name not in self.weights:
            self.weights[name] = self.function.stored(self.layout.by_name[name], _name(name))
        return self.weights[name]

    def capped(self, name: str, x: Value, cap: float, made: str = "") -> Value:
        x = self.scaled(f"{name}_narrowed", x, 1 / cap)
        x = self.function.op("tanh", f"{name}_bent", x.shape, x=x)
        return self.scaled(made or f"{name}_capped", x, cap)

    def parts(self, x: Value, sizes: list[int]) -> list[Value]:
        """Consecutive parts of the last dimension."""
        ends = np.cumsum(sizes)
        return [
            self.part(f"{x.name}_{end}", x, int(end) - size, int(end))
            for size, end in zip(sizes, ends, strict=True)
        ]

    def part(self, name: str, x: Value, start: int, stop: int) -> Value:
        """[start:stop) of the last dimension."""
        rest = len(x.shape) - 1
        return self.function.op(
            "slice_by_index",
            name,
            (*x.shape[:-1], stop - start),
            x.dtype,
            x=x,
            begin=[0] * rest + [start],
            end=[0] * rest + [stop],
            end_mask=[True] * rest + [False],
        )

    def joined(self, name: str, values: Sequence[Value | list[int]], axis: int) -> Value:
        """Values one after the other; lists of ints among them are constants."""
        held = [
            each if isinstance(each, Value) else self.function.constant(each, f"{name}_{place}")
            for place, each in enumerate(values)
        ]
        shape = list(held[0].shape)
        sizes = [each.shape[axis] for each in held]
        known = [size for size in sizes if size is not None]
        shape[axis] = sum(known) if len(known) == len(sizes) else None
        return self.function.op(
            "concat", name, tuple(shape), held[0].dtype, values=held, axis=axis, interleave=False
        )

    def two(self, kind: str, name: str, x: Value, y: Value) -> Value:
        """An operation on two tensors of one type, the second as small as it broadcasts from."""
        return self.function.op(kind, name, x.shape, x.dtype, x=x, y=y)

    def scaled(self, name: str, x: Value, factor: float) -> Value:
        """x * factor: nothing for 1, and in float32 if float16 has neither it nor its inverse."""
        if factor == 1:
            return x
        for kind, wanted in (("mul", factor), ("real_div", 1 / factor)):
            half = np.float16(wanted)
            if x.dtype == FLOAT16 and abs(float(half) - wanted) <= _SAME * abs(wanted):
                return self.function.op(kind, name, x.shape, FLOAT16, x=x, y=half)
        wide = self.cast(f"{name}_wide", x, FLOAT32)
        made = name if wide is x else f"{name}_scaled"
        wide = self.function.op("mul", made, x.shape, FLOAT32, x=wide, y=np.float32(factor))
        return self.cast(name, wide, x.dtype)

    def cast(self, name: str, x: Value, dtype: str) -> Value:
        if x.dtype == dtype:
            return x
        return self.function.op("cast", name, x.shape, dtype, x=x, dtype=CASTS[dtype])

    def reshaped(self, name: str, x: Value, *shape: int) -> Value:
        sizes: Shape = tuple(None if size < 0 else size for size in shape)
        return self.function.op("reshape", name, sizes, x.dtype, x=x, shape=list(shape))

    def transposed(self, name: str, x: Value, *order: int) -> Value:
        shape = tuple(x.shape[place] for place in order)
        return self.function.op("transpose", name, shape, x.dtype, x=x, perm=list(order))


_SAME = 1e-9


def _name(source: str) -> str:
    """A source name as MIL writes identifiers."""
    return source.replace(".", "_")
