"""The decoder as ML Programs of fixed shapes, for the Neural Engine.

Channels are the second of four dimensions, matrices are convolutions of one pixel, and norms are
layer norms of numbers beside their negatives, whose mean is zero. Rows of tables are looked up, and
masks made, before the first layer: the CPU does it.
"""

from __future__ import annotations

import numpy as np

from ...architectures import DecoderConfig, Kind
from ..coreml import skeleton
from ..coreml.blocks import Blocks, identifier
from ..coreml.decoder import IDS, MASKED
from ..coreml.layout import ROPE, Ios
from ..coreml.program import BOOL, FLOAT16, INT32, Function, Value
from ..coreml.skeleton import LOGITS
from .layout import Part, room_of, state_of

POSITION, CACHE = "position", "keyValueCache"
HIDDEN, HANDED_ON = "hidden", "hiddenOut"


def decoder_function(
    config: DecoderConfig,
    part: Part,
    context: int,
    tokens: int,
    release: Ios,
    adapted: str | None = None,
) -> Function:
    """The function `(ids (1, tokens) or hidden (1, hidden_size, 1, tokens), position (1,))`.

    It gives logits (1, tokens, vocab), or the hidden states for the next package. The first of the
    tokens stands at `position`; what is in the state at later places is not seen.

    Args:
        adapted: the function of an adapter, whose updates are added.
    """
    return _Decoder(config, part, context, tokens, Function(release.opset), adapted).build()


class _Decoder(Blocks):
    stream = FLOAT16

    def __init__(
        self,
        config: DecoderConfig,
        part: Part,
        context: int,
        tokens: int,
        function: Function,
        adapted: str | None,
    ) -> None:
        super().__init__(function, part.layout, 1, False, adapted)
        self.config, self.section, self.tokens = config, part, tokens
        self.room, self.shape = room_of(context), state_of(config, part, context)

    def build(self) -> Function:
        function, config, part = self.function, self.config, self.section
        size = config.hidden_size
        if part.first:
            given = function.input(IDS, INT32, (1, self.tokens))
        else:
            given = function.input(HIDDEN, FLOAT16, (1, size, 1, self.tokens))
        self.position = function.input(POSITION, INT32, (1,))
        self.cache = function.state(CACHE, *self.shape)
        self.places()
        stream = self.embedded(given) if part.first else given
        stream = skeleton.layers(self, stream, part.layers)
        function.output(self.logits(stream) if part.last else self.handed_on(stream))
        return function

    def places(self) -> None:
        """Where the tokens stand, what they see, and how their heads are turned."""
        function, tokens = self.function, self.tokens
        steps = function.op("range_1d", "steps", (tokens,), INT32, start=0, end=tokens, step=1)
        positions = self.two("add", "positions", steps, self.position)
        self.end = function.op("add", "end", (1,), INT32, x=self.position, y=tokens)
        rows = self.reshaped("rows", positions, tokens, 1)
        keys = function.op("range_1d", "keys", (self.room,), INT32, start=0, end=self.room, step=1)
        keys = self.reshaped("columns", keys, 1, self.room)
        self.ahead = function.op("sub", "ahead", (tokens, self.room), INT32, x=rows, y=keys)
        windows = {self.window(layer) for layer in self.section.layers}
        self.masks = {window: self.mask(window) for window in sorted(windows, key=str)}
        self.turns = {
            rope: self.turns_of(index, positions) for index, rope in enumerate(self.config.ropes)
        }

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees, if it is not all that there is room for."""
        window = self.config.attention(layer).window
        return window if window is not None and window < self.room else None

    def mask(self, window: int | None) -> Value:
        """What is added to scores: (1, 1, heads of a group x tokens, room)."""
        function, name = self.function, "mask" if window is None else f"mask_{window}"
        shape = (self.tokens, self.room)
        seen = function.op("greater_equal", f"{name}_past", shape, BOOL, x=self.ahead, y=0)
        if window is not None:
            near = function.op("less", f"{name}_near", shape, BOOL, x=self.ahead, y=window)
            seen = function.op("logical_and", f"{name}_both", shape, BOOL, x=seen, y=near)
        ones = self.cast(f"{name}_seen", seen, FLOAT16)
        less = function.op("sub", f"{name}_less", shape, x=ones, y=np.float16(1))
        added = function.op("mul", f"{name}_added", shape, x=less, y=np.float16(-MASKED))
        added = self.reshaped(f"{name}_row", added, 1, 1, *shape)
        shared = self.config.heads // self.config.kv_heads
        return self.joined(f"{name}_of_groups", [added] * shared, 2) if shared > 1 else added

    def turns_of(self, index: int, positions: Value) -> tuple[Value, Value]:
        """Cosines of a rope, and sines of which the first half is negated: (1, 1, n, rotated)."""
        found = []
        for half in ("cos", "sin"):
            table = f"{ROPE}{index}.{half}"
            *_, length, width = self.layout.by_name[table].shape
            name = identifier(table)
            rows = self.looked_up(f"{name}_rows", self.stored(table, length, width), positions)
            found.append(self.reshaped(f"{name}_row", rows, 1, 1, self.tokens, width))
        return self.wide_turns(f"rope_{index}", *found)

    def embedded(self, ids: Value) -> Value:
        """Rows of the table as columns: (1, hidden_size, 1, tokens)."""
        table = self.weight(self.layout.matrices[None, Kind.EMBEDDING])
        rows = self.looked_up("embedded", table, ids)
        columns = self.transposed("embedded_columns", rows, 0, 2, 1)
        size = self.config.hidden_size
        pixels = self.reshaped("embedded_pixels", columns, 1, size, 1, self.tokens)
        return self.scaled("embedded_scaled", pixels, self.config.embedding_multiplier)

    def attention(self, x: Value, layer: int) -> Value:
        config, name = self.config, f"layers_{layer}_attention"
        query, key, value = skeleton.queries_keys_values(self, x, layer)
        query = self.heads(f"{name}_query", query, layer, "q_norm", config.heads)
        key = self.heads(f"{name}_key", key, layer, "k_norm", config.kv_heads)
        value = self.heads(f"{name}_value", value, layer, None, config.kv_heads)
        rope = config.attention(layer).rope
        if rope is not None:
            query = self.turned(f"{name}_query", query, *self.turns[rope])
            key = self.turned(f"{name}_key", key, *self.turns[rope])
        query = self.scaled(f"{name}_query_scaled", query, config.attention_scale)
        row, size = 2 * (layer - self.section.layers.start), config.head_dim
        keys = self.kept(f"{name}_keys", key, row)
        values = self.kept(f"{name}_values", value, row + 1)
        rows = config.heads // config.kv_heads * self.tokens
        query = self.reshaped(f"{name}_query_groups", query, 1, config.kv_heads, rows, size)
        shape = (1, config.kv_heads, rows, self.room)
        scores = self.multiplied(f"{name}_scores", query, keys, shape, across=True)
        scores = self.two("add", f"{name}_masked", scores, self.masks[self.window(layer)])
        shares = self.function.op("softmax", f"{name}_shares", shape, x=scores, axis=-1)
        mixed = self.multiplied(name, shares, values, query.shape)
        mixed = self.reshaped(f"{name}_heads", mixed, 1, config.heads, self.tokens, size)
        mixed = self.transposed(f"{name}_columns", mixed, 0, 1, 3, 2)
        mixed = self.reshaped(f"{name}_joined", mixed, 1, config.heads * size, 1, self.tokens)
        return self.linear(mixed, layer, Kind.ATTENTION_OUTPUT)

    def heads(self, name: str, x: Value, layer: int, norm: str | None, count: int) -> Value:
        """(1, count, tokens, head_dim), normalized."""
        normalized = self.config.family.qk_norm if norm else None
        module = f"model.layers.{layer}.self_attn.{norm}"
        if normalized == "row":
            x = self.norm(x, module)
        x = self.reshaped(f"{name}_split", x, 1, count, self.config.head_dim, self.tokens)
        x = self.transposed(f"{name}_heads", x, 0, 1, 3, 2)
        return self.norm(x, module, axis=3) if normalized == "head" else x

    def kept(self, name: str, new: Value, row: int) -> Value:
        """A row of the state with the new tokens: (1, kv_heads, room, head_dim)."""
        config, function, cache = self.config, self.function, self.cache
        heads, size = config.kv_heads, config.head_dim
        begin = self.joined(f"{name}_begin", [[row, 0], self.position, [0]], 0)
        end = self.joined(f"{name}_end", [[row + 1, heads], self.end, [size]], 0)
        held = function.read(cache, f"{name}_before")
        given = {"x": held, "update": new, "begin": begin, "end": end}
        function.write(cache, function.op("slice_update", f"{name}_updated", cache.shape, **given))
        return function.op(
            "slice_by_index",
            f"{name}_so_far",
            (1, heads, self.room, size),
            x=function.read(cache, f"{name}_after"),
            begin=[row, 0, 0, 0],
            end=[row + 1, heads, self.room, size],
        )

    def norm(self, x: Value, module: str, dtype: str = FLOAT16, axis: int = 1) -> Value:
        """x / sqrt(mean(x ** 2) + epsilon) * weight along a dimension."""
        function, name = self.function, identifier(module)
        size = x.shape[axis]
        assert size is not None, "channels are fixed"
        both = self.joined(f"{name}_both", [x, self.scaled(f"{name}_negative", x, -1.0)], axis)
        epsilon = np.float16(self.config.rms_norm_eps)
        normal = function.op(
            "layer_norm", f"{name}_normal", both.shape, x=both, axes=[axis], epsilon=epsilon
        )
        normal = self.part(f"{name}_half", normal, 0, size, axis)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        return self.two("mul", name, normal, self.stored(f"{module}.weight", *shape))

    def linear(self, x: Value, layer: int | None, kind: Kind, name: str = "") -> Value:
        """The product with a weight, its bias and an adapter's update."""
        matrix = self.layout.matrices[layer, kind]
        bias = {"bias": self.stored(matrix.bias[0].weight.name)} if matrix.bias else {}
        name, factors = name or identifier(matrix.name), self.updates(matrix, 1, 1)
        made = f"{name}_product" if factors else name
        y = self.convolved(made, x, self.weight(matrix, 1, 1), **bias)
        if not factors:
            return y
        low = self.convolved(f"{name}_low", x, factors[0])
        return self.two("add", name, y, self.convolved(f"{name}_update", low, factors[1]))

    def convolved(self, name: str, x: Value, weight: Value, **bias: Value) -> Value:
        """weight (rows, channels, 1, 1) times every pixel: (1, rows, 1, tokens)."""
        return self.function.op(
            "conv",
            name,
            (1, weight.shape[0], 1, self.tokens),
            x=x,
            weight=weight,
            **bias,
            strides=[1, 1],
            pad_type="valid",
            pad=[0, 0, 0, 0],
            dilations=[1, 1],
            groups=1,
        )

    def logits(self, stream: Value) -> Value:
        columns = skeleton.head(self, stream, "head_columns")
        rows = self.transposed("head_rows", columns, 0, 2, 3, 1)
        return self.reshaped(LOGITS, rows, 1, self.tokens, self.config.vocab_size)

    def handed_on(self, stream: Value) -> Value:
        """The stream under a name of its own."""
        return self.function.op("identity", HANDED_ON, stream.shape, x=stream)
