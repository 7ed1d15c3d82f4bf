"""What every decoder does, whatever operations it is made of: layers, network, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...architectures import DecoderConfig, Kind
from .program import FLOAT16, Function, Value

LOGITS = "logits"


class Parts(Protocol):
    """A decoder's own operations, beside those of `Blocks`.

    Attributes:
        stream: the type of the residual stream.
    """

    config: DecoderConfig
    function: Function
    stream: str

    def attention(self, x: Value, layer: int) -> Value:
        """What attention makes of the normalized stream."""

    def norm(self, x: Value, module: str, dtype: str = FLOAT16) -> Value:
        """x over its root mean square, times the weight of a norm."""

    def linear(self, x: Value, layer: int | None, kind: Kind, name: str = "") -> Value:
        """The product with a weight, and its bias."""

    def parts(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Consecutive channels."""

    def two(self, kind: str, name: str, x: Value, y: Value) -> Value:
        """An operation on two tensors."""

    def scaled(self, name: str, x: Value, factor: float) -> Value:
        """x * factor."""

    def capped(self, name: str, x: Value, cap: float, made: str = "") -> Value:
        """x drawn softly into (-cap, cap)."""

    def cast(self, name: str, x: Value, dtype: str) -> Value:
        """x as another type."""


def layers(build: Parts, stream: Value, which: Iterable[int]) -> Value:
    """The stream after some layers."""
    for layer in which:
        x = _normed(build, stream, layer, Kind.ATTENTION_NORM, FLOAT16)
        x = build.attention(x, layer)
        stream = _added(build, stream, x, layer, Kind.ATTENTION_POST_NORM)
        x = _normed(build, stream, layer, Kind.FFN_NORM, FLOAT16)
        x = _network(build, x, layer)
        stream = _added(build, stream, x, layer, Kind.FFN_POST_NORM)
    return stream


def head(build: Parts, stream: Value, name: str = LOGITS) -> Value:
    """Logits of the stream after the last layer."""
    config = build.config
    x = build.norm(stream, "model.norm")
    plain = config.logits_divisor == 1 and config.logits_softcap is None
    kind = Kind.EMBEDDING if config.tied else Kind.HEAD
    x = build.linear(x, None, kind, name if plain else "head")
    if config.logits_softcap is None:
        return build.scaled(name, x, 1 / config.logits_divisor)
    x = build.scaled("head_scaled", x, 1 / config.logits_divisor)
    return build.capped("head", x, config.logits_softcap, name)


def queries_keys_values(build: Parts, x: Value, layer: int) -> list[Value]:
    """What attention compares and mixes: of one product, or of three."""
    config = build.config
    if not config.family.fused:
        return [build.linear(x, layer, kind) for kind in (Kind.Q, Kind.K, Kind.V)]
    sizes = [count * config.head_dim for count in (config.heads, *(config.kv_heads,) * 2)]
    return build.parts(build.linear(x, layer, Kind.QKV), sizes)


def _network(build: Parts, x: Value, layer: int) -> Value:
    """What the feed-forward network makes of the stream."""
    config, name = build.config, f"layers_{layer}_network"
    if config.family.fused:
        both = build.linear(x, layer, Kind.GATE_UP)
        gate, up = build.parts(both, [config.intermediate_size] * 2)
    else:
        gate, up = (build.linear(x, layer, kind) for kind in (Kind.GATE, Kind.UP))
    if config.family.activation == "silu":
        gate = build.function.op("silu", f"{name}_gate", gate.shape, x=gate)
    else:
        mode = "TANH_APPROXIMATION"
        gate = build.function.op("gelu", f"{name}_gate", gate.shape, x=gate, mode=mode)
    return build.linear(build.two("mul", f"{name}_inner", gate, up), layer, Kind.DOWN)


def _added(build: Parts, stream: Value, x: Value, layer: int, norm: Kind) -> Value:
    name = f"layers_{layer}_{norm.value}"
    x = _normed(build, x, layer, norm, build.stream)
    x = build.scaled(f"{name}_scaled", x, build.config.residual_multiplier)
    return build.two("add", f"{name}_added", stream, x)


def _normed(build: Parts, x: Value, layer: int, kind: Kind, dtype: str) -> Value:
    """The norm of a layer, or nothing where its family has none there."""
    norms = dict(build.config.family.norms)
    if kind not in norms:
        return build.cast(f"layers_{layer}_{kind.value}_none", x, dtype)
    return build.norm(x, f"model.layers.{layer}.{norms[kind]}", dtype)
