"""The decoder as an ML Program of flexible lengths, for the GPU and the CPU.

Inputs, output and states have the names that Hugging Face's swift-transformers gives them. Numbers
are float16, but for norms and what they read, which are float32 inside: a square of 256 would not
fit. Heads that share keys and values are laid side by side along the queries, so that neither is
repeated.
"""

from __future__ import annotations

import numpy as np

from ...architectures import SCORE as SCORE_WEIGHT
from ...architectures import DecoderConfig, Kind
from ..container import Deployment
from ..layout import Layout
from . import skeleton
from .blocks import SAME, Blocks, identifier
from .layout import ROPE, Ios, zeros_of
from .program import BOOL, FLOAT16, FLOAT32, INT32, Flexible, Function, Value

__all__ = [
    *("FULL", "IDS", "KEYS", "LOGITS", "MASKED", "SCORE", "SLIDING", "VALUES"),
    *("decoder_function", "masks", "reward_function"),
]

IDS = "inputIds"
FULL, SLIDING = "fullAttentionMask", "slidingAttentionMask"
KEYS, VALUES, SCORE = "keyCache", "valueCache", "score"
MASKED = -40000.0  # as Apple's guides: an infinite one makes what is no number


def decoder_function(
    config: DecoderConfig,
    layout: Layout,
    deployment: Deployment,
    release: Ios,
    adapted: str | None = None,
) -> Function:
    """The function `(ids (1, n), masks (1, 1, n, total)) -> logits (1, n, vocab)`.

    The ids are the last n of `total` tokens; keys and values of those before are in the states.

    Args:
        adapted: the name of the function, if it is that of an adapter.
    """
    return _Decoder(config, layout, deployment.context, Function(release.opset), adapted).build()


def reward_function(
    config: DecoderConfig, layout: Layout, deployment: Deployment, release: Ios
) -> Function:
    """The function `ids (1, n) -> score (1,)` float32, of a text that ends with its last id."""
    function = Function(release.opset)
    return _Decoder(config, layout, deployment.context, function, None).build_reward()


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


class _Decoder(Blocks):
    def __init__(
        self,
        config: DecoderConfig,
        layout: Layout,
        context: int,
        function: Function,
        adapted: str | None,
    ) -> None:
        super().__init__(function, layout, -1, True, adapted)
        self.config, self.context = config, context
        self.stream = FLOAT32 if config.family.scaled_embedding else FLOAT16

    def build(self) -> Function:
        function, config = self.function, self.config
        ids = function.input(IDS, INT32, Flexible(((1, 1), (1, self.context))))
        self.masks = self.given_masks()
        shape = (config.layers, 1, config.kv_heads, self.context, config.head_dim)
        self.caches = [function.state(name, *shape) for name in (KEYS, VALUES)]
        self.positions(next(iter(self.masks.values())))
        self.turns = {rope: self.turns_of(index) for index, rope in enumerate(config.ropes)}
        stream = skeleton.layers(self, self.embedded(ids), range(config.layers))
        function.output(skeleton.head(self, stream))
        return function

    def build_reward(self) -> Function:
        """Without states: a text is read at once."""
        function, config = self.function, self.config
        ids = function.input(IDS, INT32, Flexible(((1, 1), (1, self.context))))
        sizes = function.op("shape", "ids_sizes", (2,), INT32, x=ids)
        self.total = function.op(
            "slice_by_index", "total", (1,), INT32, x=sizes, begin=[1], end=[2]
        )
        self.caches, self.start = [], function.constant([0], "start")
        self.repeated = self.made_masks()
        self.turns = {rope: self.turns_of(index) for index, rope in enumerate(config.ropes)}
        stream = skeleton.layers(self, self.embedded(ids), range(config.layers))
        normed = self.norm(stream, "model.norm", FLOAT32)
        last = function.op(
            "slice_by_index",
            "last",
            (1, 1, config.hidden_size),
            FLOAT32,
            x=normed,
            begin=[0, -1, 0],
            end=[0, 0, 0],
            end_mask=[True, True, True],
        )
        weighed = self.two("mul", "weighed", last, self.stored(SCORE_WEIGHT))
        score = function.op(
            "reduce_sum", SCORE, (1,), FLOAT32, x=weighed, axes=[1, 2], keep_dims=False
        )
        function.output(score)
        return function

    def made_masks(self) -> dict[bool, Value]:
        """Masks as an app would give them, for the heads of a group: they follow from n alone."""
        function, square = self.function, (None, None)
        count = function.op("squeeze", "count", (), INT32, x=self.total, axes=[0])
        places = function.op("range_1d", "places", (None,), INT32, start=0, end=count, step=1)
        rows, columns = (
            function.op("expand_dims", name, shape, INT32, x=places, axes=[axis])
            for name, shape, axis in (("rows", (None, 1), 1), ("columns", (1, None), 0))
        )
        ahead = function.op("sub", "ahead", square, INT32, x=rows, y=columns)
        shared, found = self.config.heads // self.config.kv_heads, {}
        for sliding, window in masks(self.config, self.context).items():
            name = SLIDING if sliding else FULL
            seen = function.op("greater_equal", f"{name}_past", square, BOOL, x=ahead, y=0)
            if window is not None:
                near = function.op("less", f"{name}_near", square, BOOL, x=ahead, y=window)
                seen = function.op("logical_and", f"{name}_both", square, BOOL, x=seen, y=near)
            ones = self.cast(f"{name}_seen", seen, FLOAT16)
            less = function.op("sub", f"{name}_less", square, x=ones, y=np.float16(1))
            mask = function.op("mul", f"{name}_added", square, x=less, y=np.float16(-MASKED))
            mask = function.op("expand_dims", name, (1, 1, *square), x=mask, axes=[0, 1])
            found[sliding] = (
                self.joined(f"{name}_of_groups", [mask] * shared, 2) if shared > 1 else mask
            )
        return found

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

    def turns_of(self, index: int) -> tuple[Value, Value]:
        """Cosines of a rope, and sines of which the first half is negated: (1, 1, n, rotated)."""
        cos, sin = (self.rows_of(f"{ROPE}{index}.{h}") for h in ("cos", "sin"))
        return self.wide_turns(f"rope_{index}", cos, sin)

    def rows_of(self, table: str) -> Value:
        """The rows of a table at the positions of the ids, in float16."""
        whole, name = self.stored(table), identifier(table)
        begin = self.joined(f"{name}_begin", [[0, 0], self.start, [0]], 0)
        end = self.joined(f"{name}_end", [[0, 0], self.total, [0]], 0)
        rows = self.function.op(
            "slice_by_index",
            f"{name}_rows",
            (1, 1, None, whole.shape[3]),
            FLOAT32,
            x=whole,
            begin=begin,
            end=end,
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
        )
        return self.cast(f"{name}_half", rows, FLOAT16)

    def embedded(self, ids: Value) -> Value:
        table = self.weight(self.layout.matrices[None, Kind.EMBEDDING])
        rows = self.looked_up("embedded", table, ids)
        rows = self.cast("embedded_as_stream", rows, self.stream)
        return self.scaled("embedded_scaled", rows, self.config.embedding_multiplier)

    def attention(self, x: Value, layer: int) -> Value:
        """What attention makes of the stream: (1, n, hidden_size)."""
        config, name = self.config, f"layers_{layer}_attention"
        query, key, value = skeleton.queries_keys_values(self, x, layer)
        query = self.heads(f"{name}_query", query, layer, "q_norm", config.heads)
        key = self.heads(f"{name}_key", key, layer, "k_norm", config.kv_heads)
        value = self.heads(f"{name}_value", value, layer, None, config.kv_heads)
        rope = config.attention(layer).rope
        if rope is not None:
            query = self.turned(f"{name}_query", query, *self.turns[rope])
            key = self.turned(f"{name}_key", key, *self.turns[rope])
        query = self.scaled(f"{name}_query_scaled", query, self.query_factor())
        keys, values = key, value
        if self.caches:
            keys, values = (
                self.kept(f"{name}_{what}", cache, new, layer)
                for what, cache, new in zip(
                    ("keys", "values"), self.caches, (key, value), strict=True
                )
            )
        size = config.head_dim
        query = self.reshaped(f"{name}_query_groups", query, 1, config.kv_heads, -1, size)
        mask = self.repeated[windowed(config, layer, self.context)]
        mixed = self.mixed(name, query, keys, values, mask)
        mixed = self.reshaped(f"{name}_heads", mixed, 1, config.heads, -1, size)
        mixed = self.transposed(f"{name}_rows", mixed, 0, 2, 1, 3)
        mixed = self.reshaped(f"{name}_joined", mixed, 1, -1, config.heads * size)
        return self.linear(mixed, layer, Kind.ATTENTION_OUTPUT)

    def mixed(self, name: str, query: Value, keys: Value, values: Value, mask: Value) -> Value:
        """Values weighted by the softmax of masked scores: (1, kv_heads, heads x n, head_dim)."""
        function, cap = self.function, self.config.attention_softcap
        if cap is None:
            given = {"query": query, "key": keys, "value": values, "attn_mask": mask}
            return function.op("scaled_dot_product_attention", name, query.shape, **given)
        shape = (*query.shape[:-1], None)
        scores = self.multiplied(f"{name}_scores", query, keys, shape, across=True)
        scores = self.capped(f"{name}_scores", scores, cap)
        scores = function.op("add", f"{name}_masked", shape, x=scores, y=mask)
        shares = function.op("softmax", f"{name}_shares", shape, x=scores, axis=-1)
        return self.multiplied(name, shares, values, query.shape)

    def query_factor(self) -> float:
        """What queries are multiplied by: attention itself divides scores by sqrt(head_dim)."""
        factor = self.config.attention_scale
        if self.config.attention_softcap is None:
            factor *= self.config.head_dim**0.5
        return 1.0 if abs(factor - 1) < SAME else factor

    def heads(self, name: str, x: Value, layer: int, norm: str | None, count: int) -> Value:
        """(1, count, n, head_dim), normalized."""
        normalized = self.config.family.qk_norm if norm else None
        module = f"model.layers.{layer}.self_attn.{norm}"
        if normalized == "row":
            x = self.norm(x, module)
        x = self.reshaped(f"{name}_split", x, 1, -1, count, self.config.head_dim)
        x = self.norm(x, module) if normalized == "head" else x
        return self.transposed(f"{name}_heads", x, 0, 2, 1, 3)

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

    def norm(self, x: Value, module: str, dtype: str = FLOAT16) -> Value:
        """x / sqrt(mean(x ** 2) + epsilon) * (weight + offset), computed in float32."""
        function, name = self.function, identifier(module)
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
        """The product with a weight, its bias and an adapter's update; in float16."""
        matrix = self.layout.matrices[layer, kind]
        weight, function = self.weight(matrix), self.function
        name, rows, given = name or identifier(matrix.name), matrix.shape[0], x
        factors = self.updates(matrix)
        plain = weight.dtype == x.dtype and not matrix.bias and not factors
        x = function.op(
            "linear",
            name if plain else f"{name}_product",
            (*x.shape[:-1], rows),
            weight.dtype,
            x=self.cast(f"{name}_input", x, weight.dtype),
            weight=weight,
            bias=self.stored(zeros_of(matrix)),
        )
        x = self.cast(f"{name}_half" if matrix.bias or factors else name, x, FLOAT16)
        if matrix.bias:
            bias = self.stored(matrix.bias[0].weight.name)
            bias = self.cast(f"{bias.name}_half", bias, FLOAT16)
            x = self.two("add", f"{name}_raised" if factors else name, x, bias)
        if not factors:
            return x
        narrow, wide = factors
        shape = (*given.shape[:-1], narrow.shape[0])
        low = self.multiplied(f"{name}_low", given, narrow, shape, across=True)
        update = self.multiplied(f"{name}_update", low, wide, x.shape, across=True)
        return self.two("add", name, x, update)
