"""The graph of a whole decoder for a fixed number of tokens: hidden states in, logits out.

It reads `slots` cached positions. The caller writes the new keys and values of a run into any slots
and says in `mask` which of them count: all runs share one cache, whatever their number of tokens.

    hidden (1, tokens, hidden_size)            rows of the embedding
    mask (1, 1, group * tokens, slots + tokens)    0 for what a token sees, MASKED for the rest
    cos_i, sin_i (1, 1, tokens, head_dim)      of rope i; the first half of the sines is negated
    past_k_i (1, kv_heads, head_dim, slots), past_v_i (1, kv_heads, slots, head_dim)
    logits (1, tokens, vocab_size); new_k_i and new_v_i as past_k_i and past_v_i, of `tokens` slots

`group` is heads / kv_heads; query heads of one group lie one after the other in the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ...architectures import DecoderConfig, Kind, Rope
from ...quantize.grid import Float32
from ..layout import Layout, Matrix
from .encoding import Encodings
from .layout import head
from .static import Static, Tensor

# -20 leaves shares to what must not be seen; -10000 eats the resolution of the 16-bit scores.
MASKED = -100.0
HIDDEN, MASK, LOGITS, COS, SIN = "hidden", "mask", "logits", "cos_{}", "sin_{}"
PAST_K, PAST_V, NEW_K, NEW_V = "past_k_{}", "past_v_{}", "new_k_{}", "new_v_{}"
Vectors = Callable[[str], Float32]


class Size(NamedTuple):
    """Tokens of one run, and cached positions that it reads."""

    tokens: int
    slots: int


def decoder_graph(
    config: DecoderConfig, placed: Layout, size: Size, vectors: Vectors, encodings: Encodings | None
) -> Static:
    """The decoder that `config` describes.

    Args:
        vectors: norms and biases by source name.
        encodings: None: in float, with every tensor as an output.
    """
    static = Static(placed, encodings)
    build = _Decoder(static, config, placed, size, vectors)
    static.outputs({LOGITS: build.logits(), **build.news})
    return static


class _Decoder:
    """The layers of a decoder, added to `static` one after the other.

    `news` gathers the new keys and values.
    """

    def __init__(
        self, static: Static, config: DecoderConfig, placed: Layout, size: Size, vectors: Vectors
    ) -> None:
        self.static, self.config, self.placed = static, config, placed
        self.tokens, self.slots = size
        self.vectors = vectors
        self.norms = dict(config.family.norms)
        self.news: dict[str, Tensor] = {}
        rows = config.heads // config.kv_heads * self.tokens
        self.hidden = static.input(HIDDEN, (1, self.tokens, config.hidden_size))
        self.mask = static.input(MASK, (1, 1, rows, self.slots + self.tokens))
        turned = (1, 1, self.tokens, config.head_dim)
        self.turns: dict[Rope, tuple[Tensor, Tensor]] = {
            rope: (static.input(COS.format(index), turned), static.input(SIN.format(index), turned))
            for index, rope in enumerate(config.ropes)
        }

    def logits(self) -> Tensor:
        hidden = self.hidden
        for layer in range(self.config.layers):
            hidden = self.layer(hidden, layer)
        logits = self.linear(self.norm(hidden, "model.norm"), head(self.config, self.placed))
        logits = self.static.scaled("logits.scaled", logits, 1 / self.config.logits_divisor)
        return self.capped("logits.capped", logits, self.config.logits_softcap)

    def layer(self, hidden: Tensor, layer: int) -> Tensor:
        root = f"model.layers.{layer}"
        parts = (
            ("attention", Kind.ATTENTION_NORM, Kind.ATTENTION_POST_NORM, self.attention),
            ("feed_forward", Kind.FFN_NORM, Kind.FFN_POST_NORM, self.feed_forward),
        )
        for name, before, after, compute in parts:
            added = compute(self.normed(hidden, root, before), layer)
            added = self.normed(added, root, after)
            factor = self.config.residual_multiplier
            added = self.static.scaled(f"{root}.{name}.scaled", added, factor)
            hidden = self.static.op("Add", f"{root}.{name}.added", [hidden, added], hidden.shape)
        return hidden

    def normed(self, x: Tensor, root: str, kind: Kind) -> Tensor:
        """The norm of a layer, or nothing where its family has none there."""
        return self.norm(x, f"{root}.{self.norms[kind]}") if kind in self.norms else x

    def norm(self, x: Tensor, name: str) -> Tensor:
        gain = self.vectors(f"{name}.weight") + self.config.family.norm_offset
        inputs = [x, self.static.constant(f"{name}.weight", gain)]
        epsilon = self.config.rms_norm_eps
        return self.static.op("RMSNormalization", name, inputs, x.shape, axis=-1, epsilon=epsilon)

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        biases = [self.vectors(choice.weight.name) for choice in matrix.bias]
        return self.static.linear(x, matrix, *biases)

    def matrix(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        return self.linear(x, self.placed.matrices[layer, kind])

    def split(
        self, x: Tensor, layer: int, fused: Kind, kinds: Sequence[Kind], sizes: Sequence[int]
    ) -> list[Tensor]:
        """What matrices of `sizes` outputs make of x, or one matrix that holds all their rows."""
        if not self.config.family.fused:
            return [self.matrix(x, kind, layer) for kind in kinds]
        made, ends = self.matrix(x, fused, layer), list(accumulate(sizes))
        return [
            self.static.part(f"{made.name}.{kind.name.lower()}", made, end - size, end)
            for kind, size, end in zip(kinds, sizes, ends, strict=True)
        ]

    def attention(self, x: Tensor, layer: int) -> Tensor:
        config, static = self.config, self.static
        name = f"model.layers.{layer}.self_attn"
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        sizes = [count * dim for count in (heads, kv_heads, kv_heads)]
        query, key, value = self.split(x, layer, Kind.QKV, (Kind.Q, Kind.K, Kind.V), sizes)
        query = self.heads(query, heads, layer, Kind.Q_NORM)
        key = self.heads(key, kv_heads, layer, Kind.K_NORM)
        value = self.heads(value, kv_heads, layer, None)
        query = static.scaled(f"{name}.query.scaled", query, config.attention_scale)
        rows = heads // kv_heads * self.tokens
        query = static.reshape(f"{name}.query.grouped", query, 1, kv_heads, rows, dim)
        key, value = (
            static.recoded(f"{name}.{part}.cached", x)
            for part, x in (("key", key), ("value", value))
        )
        key = static.transpose(f"{name}.key.turned", key, 0, 1, 3, 2)
        self.news |= {NEW_K.format(layer): key, NEW_V.format(layer): value}
        past_key = static.cache(PAST_K.format(layer), (1, kv_heads, dim, self.slots))
        past_value = static.cache(PAST_V.format(layer), (1, kv_heads, self.slots, dim))
        keys = static.joined(f"{name}.keys", [past_key, key], 3)
        values = static.joined(f"{name}.values", [past_value, value], 2)
        shape = (1, kv_heads, rows, self.slots + self.tokens)
        scores = static.op("MatMul", f"{name}.scores", [query, keys], shape)
        scores = self.capped(f"{name}.scores.capped", scores, config.attention_softcap)
        scores = static.op("Add", f"{name}.scores.masked", [scores, self.mask], shape)
        shares = static.op("Softmax", f"{name}.shares", [scores], shape, axis=-1)
        mixed = static.op("MatMul", f"{name}.mixed", [shares, values], query.shape)
        mixed = static.reshape(f"{name}.mixed.heads", mixed, 1, heads, self.tokens, dim)
        mixed = static.transpose(f"{name}.mixed.turned", mixed, 0, 2, 1, 3)
        mixed = static.reshape(f"{name}.mixed.joined", mixed, 1, self.tokens, heads * dim)
        return self.matrix(mixed, Kind.ATTENTION_OUTPUT, layer)

    def heads(self, x: Tensor, count: int, layer: int, norm: Kind | None) -> Tensor:
        """(1, count, tokens, head_dim), normalized and rotated; values are neither."""
        name = x.name
        norms = {Kind.Q_NORM: "q_norm", Kind.K_NORM: "k_norm"}
        module = f"model.layers.{layer}.self_attn.{norms[norm]}" if norm else ""
        if norm and self.config.family.qk_norm == "row":
            x = self.norm(x, module)
        dim = self.config.head_dim
        if norm and self.config.family.qk_norm == "head":  # four dimensions crash the emulator
            x = self.static.reshape(f"{name}.rows", x, 1, self.tokens * count, dim)
            x = self.norm(x, module)
        x = self.static.reshape(f"{name}.split", x, 1, self.tokens, count, dim)
        x = self.static.transpose(f"{name}.heads", x, 0, 2, 1, 3)
        rope = self.config.attention(layer).rope
        return self.rotated(f"{name}.rotated", x, rope) if norm else x

    def rotated(self, name: str, x: Tensor, rope: Rope | None) -> Tensor:
        """x * cos + (second half, first half, what stays) * sin.

        Without a rope by no angle: the compiler leaves the transposes of keys that nothing was
        computed of to the CPU.
        """
        static, dim = self.static, self.config.head_dim
        if rope is None:
            cos = static.constant("cos", np.ones(dim, np.float32))
            sin = static.constant("sin", np.zeros(dim, np.float32))
        else:
            cos, sin = self.turns[rope]
        end = rope.rotated(dim) if rope else dim
        parts = [
            static.part(f"{name}.second", x, end // 2, end),
            static.part(f"{name}.first", x, 0, end // 2),
        ]
        if end < dim:
            parts.append(static.part(f"{name}.rest", x, end, dim))
        swapped = static.joined(f"{name}.swapped", parts, 3)
        products = [
            static.op("Mul", f"{name}.cos", [x, cos], x.shape),
            static.op("Mul", f"{name}.sin", [swapped, sin], x.shape),
        ]
        return static.op("Add", name, products, x.shape)

    def capped(self, name: str, x: Tensor, cap: float | None) -> Tensor:
        """cap * tanh(x / cap)."""
        if cap is None:
            return x
        x = self.static.scaled(f"{name}.small", x, 1 / cap)
        x = self.static.op("Tanh", f"{name}.tanh", [x], x.shape)
        return self.static.scaled(name, x, cap)

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        static, name = self.static, f"model.layers.{layer}.mlp"
        sizes = [self.config.intermediate_size] * 2
        gate, up = self.split(x, layer, Kind.GATE_UP, (Kind.GATE, Kind.UP), sizes)
        if self.config.family.activation == "silu":
            sigmoid = static.op("Sigmoid", f"{name}.sigmoid", [gate], gate.shape)
            gate = static.op("Mul", f"{name}.act", [gate, sigmoid], gate.shape)
        else:
            gate = static.op("Gelu", f"{name}.act", [gate], gate.shape, approximate="tanh")
        inner = static.op("Mul", f"{name}.inner", [gate, up], gate.shape)
        return self.matrix(inner, Kind.DOWN, layer)
