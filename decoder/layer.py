"""One decoder layer, as functions over its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from .positions import Cache, Tables


class Parameters(NamedTuple):
    """The tensors of one Linear (weight (outputs, inputs) and bias) or norm (weight alone)."""

    weight: Tensor
    bias: Tensor | None = None


LayerWeights = Mapping[Kind, Parameters]
Capture = Callable[[Kind, Tensor], None]

# Linears that read the same input, under the first of them; and the norms that read the residual
# stream to which the output of a Linear is added, if it is added as it is.
SHARED_INPUTS = {
    Kind.Q: (Kind.Q, Kind.K, Kind.V),
    Kind.QKV: (Kind.QKV,),
    Kind.ATTENTION_OUTPUT: (Kind.ATTENTION_OUTPUT,),
    Kind.GATE: (Kind.GATE, Kind.UP),
    Kind.GATE_UP: (Kind.GATE_UP,),
    Kind.DOWN: (Kind.DOWN,),
}
RESIDUALS = {Kind.ATTENTION_OUTPUT: Kind.ATTENTION_NORM, Kind.DOWN: Kind.FFN_NORM}


def load_layer(
    source: Weights, config: DecoderConfig, layer: int, replaced: Mapping[str, Tensor] = {}
) -> LayerWeights:
    """Read the weights of one layer as float32; `replaced` {source name: tensor} goes first."""
    found: dict[Kind, dict[str, Tensor]] = {}
    for weight in weights(config):
        if weight.layer != layer:
            continue
        field = weight.name.rpartition(".")[2]
        tensor = replaced.get(weight.name)
        if tensor is None:
            tensor = read_tensor(source, weight.name)
        found.setdefault(weight.kind, {})[field] = tensor
    return {kind: Parameters(**fields) for kind, fields in found.items()}


def decoder_layer(
    hidden: Tensor,
    layer: LayerWeights,
    config: DecoderConfig,
    tables: Tables,
    capture: Capture | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """One decoder layer: (windows, length, hidden_size) in and out.

    Args:
        tables: of this layer, for the window's length; with a cache for the positions of this
            run, with what they see of the cache.
        capture: called with each key of SHARED_INPUTS and each value of RESIDUALS, and the input
            that these weights read.
        cache: keys and values of earlier runs, to which those of this one are added; None: the
            tokens are whole windows.
    """
    capture = capture or _ignore
    capture(Kind.ATTENTION_NORM, hidden)
    inputs = _norm(hidden, layer, Kind.ATTENTION_NORM, config)
    added = _attention(inputs, layer, config, tables, capture, cache)
    added = _norm(added, layer, Kind.ATTENTION_POST_NORM, config)
    hidden = hidden + added * config.residual_multiplier
    capture(Kind.FFN_NORM, hidden)
    inputs = _norm(hidden, layer, Kind.FFN_NORM, config)
    added = _feed_forward(inputs, layer, config, capture)
    added = _norm(added, layer, Kind.FFN_POST_NORM, config)
    return hidden + added * config.residual_multiplier


def read_tensor(source: Weights, name: str) -> Tensor:
    """A tensor of the checkpoint in float32."""
    return torch.from_numpy(np.require(source.rows(name), np.float32, ["C", "W"]))


def _attention(
    hidden: Tensor,
    layer: LayerWeights,
    config: DecoderConfig,
    tables: Tables,
    capture: Capture,
    cache: Cache | None,
) -> Tensor:
    windows, length, _ = hidden.shape
    if config.family.fused:
        capture(Kind.QKV, hidden)
        keys = config.heads * config.head_dim
        values = keys + config.kv_heads * config.head_dim
        parts = functional.linear(hidden, *layer[Kind.QKV]).tensor_split([keys, values], dim=-1)
    else:
        capture(Kind.Q, hidden)
        parts = tuple(functional.linear(hidden, *layer[k]) for k in (Kind.Q, Kind.K, Kind.V))

    def heads(states: Tensor, norm: Kind | None = None) -> Tensor:
        """(windows, heads, length, head_dim)"""
        if norm and config.family.qk_norm == "row":
            states = _norm(states, layer, norm, config)
        states = states.view(windows, length, -1, config.head_dim)
        if norm and config.family.qk_norm == "head":
            states = _norm(states, layer, norm, config)
        return states.transpose(1, 2)

    query = _rotate(heads(parts[0], Kind.Q_NORM), tables)
    key = _rotate(heads(parts[1], Kind.K_NORM), tables)
    value = heads(parts[2])
    if cache is not None:
        key = cache.keys.index_copy_(2, cache.positions, key)
        value = cache.values.index_copy_(2, cache.positions, value)
    key, value = _repeat_heads(key, config), _repeat_heads(value, config)
    mixed = _mix(query, key, value, config, tables.seen)
    mixed = mixed.transpose(1, 2).reshape(windows, length, config.heads * config.head_dim)
    capture(Kind.ATTENTION_OUTPUT, mixed)
    return functional.linear(mixed, *layer[Kind.ATTENTION_OUTPUT])


def _mix(
    query: Tensor, key: Tensor, value: Tensor, config: DecoderConfig, seen: Tensor | None
) -> Tensor:
    """Values weighted by the softmax of the scores; all (windows, heads, length, head_dim)."""
    if config.attention_softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, seen, is_causal=seen is None, scale=config.attention_scale
        )
    scores = capped(query @ key.mT * config.attention_scale, config.attention_softcap)
    if seen is None:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def capped(values: Tensor, cap: float | None) -> Tensor:
    """Values drawn softly into (-cap, cap), as Gemma 2 does; None: as they are."""
    return values if cap is None else cap * torch.tanh(values / cap)


def _feed_forward(
    hidden: Tensor, layer: LayerWeights, config: DecoderConfig, capture: Capture
) -> Tensor:
    if config.family.fused:
        capture(Kind.GATE_UP, hidden)
        gate, up = functional.linear(hidden, *layer[Kind.GATE_UP]).chunk(2, dim=-1)
    else:
        capture(Kind.GATE, hidden)
        gate, up = (functional.linear(hidden, *layer[kind]) for kind in (Kind.GATE, Kind.UP))
    if config.family.activation == "silu":
        gate = functional.silu(gate)
    else:
        gate = functional.gelu(gate, approximate="tanh")
    inner = gate * up
    capture(Kind.DOWN, inner)
    return functional.linear(inner, *layer[Kind.DOWN])


def _norm(hidden: Tensor, layer: LayerWeights, kind: Kind, config: DecoderConfig) -> Tensor:
    """The norm of a layer, or nothing where its family has none there."""
    return rms_norm(hidden, layer[kind].weight, config) if kind in layer else hidden


def rms_norm(hidden: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    """Rows (..., n) over their root mean square, times the weight (n,) of the norm."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    normed = hidden * torch.rsqrt(variance + config.rms_norm_eps)
    offset = config.family.norm_offset
    return normed * (weight + offset if offset else weight)  # no sum where it is traced for nothing


def _rotate(states: Tensor, tables: Tables) -> Tensor:
    if tables.cos is None or tables.sin is None:
        return states
    rotated, kept = states.tensor_split([tables.cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * tables.cos + torch.cat((-second, first), dim=-1) * tables.sin
    return torch.cat((rotated, kept), dim=-1)


def _repeat_heads(states: Tensor, config: DecoderConfig) -> Tensor:
    """Each key or value head once for every query head that shares it (expand: traceable)."""
    windows, heads, length, size = states.shape
    shared = config.heads // config.kv_heads
    expanded = states[:, :, None].expand(windows, heads, shared, length, size)
    return expanded.reshape(windows, heads * shared, length, size)


def _ignore(kind: Kind, states: Tensor) -> None:
    """The capture of a plain forward pass."""
