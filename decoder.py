"""One plain decoder in float32 torch, layer by layer; every family of architectures.py.

Functions over the weights of one layer, so calibration can stream a model through it and exporters
can trace it. Held to transformers by a test; never the oracle of a validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .architectures import DecoderConfig, Kind, Rope, weights
from .checkpoint import Weights


class Parameters(NamedTuple):
    """The tensors of one Linear (weight (outputs, inputs) and bias) or norm (weight alone)."""

    weight: Tensor
    bias: Tensor | None = None


LayerWeights = Mapping[Kind, Parameters]
Capture = Callable[[Kind, Tensor], None]

# Linears that read the same input, under the first of them; and the norms that read the residual
# stream to which the output of a Linear is added.
SHARED_INPUTS = {
    Kind.Q: (Kind.Q, Kind.K, Kind.V),
    Kind.ATTENTION_OUTPUT: (Kind.ATTENTION_OUTPUT,),
    Kind.GATE: (Kind.GATE, Kind.UP),
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
            tensor = _read(source, weight.name)
        found.setdefault(weight.kind, {})[field] = tensor
    return {kind: Parameters(**fields) for kind, fields in found.items()}


def rope_tables(config: DecoderConfig, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, head_dim), of positions start .. start + length - 1.

    The second half of the columns repeats the first: heads are rotated in halves, as in Hugging
    Face checkpoints.
    """
    positions = torch.arange(start, start + length, dtype=torch.float32)
    angles = torch.outer(positions, _frequencies(config.rope, config.head_dim))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, (head_dim / 2,); the scalings of `modeling_rope_utils.py`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    # llama3: long wavelengths are stretched, short ones kept, those between blended.
    turns = rope.original_context * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def decoder_layer(
    hidden: Tensor,
    layer: LayerWeights,
    config: DecoderConfig,
    cos: Tensor,
    sin: Tensor,
    capture: Capture | None = None,
) -> Tensor:
    """One decoder layer over whole windows: (windows, length, hidden_size) in and out.

    Args:
        cos, sin: `rope_tables` of the window's positions.
        capture: called with each key of SHARED_INPUTS and each value of RESIDUALS, and the input
            that these weights read.
    """
    capture = capture or _ignore
    capture(Kind.ATTENTION_NORM, hidden)
    normed = _rms_norm(hidden, layer[Kind.ATTENTION_NORM], config)
    hidden = hidden + _attention(normed, layer, config, cos, sin, capture)
    capture(Kind.FFN_NORM, hidden)
    normed = _rms_norm(hidden, layer[Kind.FFN_NORM], config)
    return hidden + _feed_forward(normed, layer, capture)


def head(hidden: Tensor, norm: Tensor, table: Tensor, config: DecoderConfig) -> Tensor:
    """Logits (..., vocab_size) from the last layer's output, the final norm and the head's table.

    With tied embeddings `table` is the embedding.
    """
    return functional.linear(_rms_norm(hidden, Parameters(norm), config), table)


def logits(tokens: Tensor, source: Weights, config: DecoderConfig) -> Tensor:
    """The whole decoder, one layer in memory at a time: ids (windows, length) to logits."""
    names = {weight.kind: weight.name for weight in weights(config) if weight.layer is None}
    table = _read(source, names[Kind.EMBEDDING])
    hidden = functional.embedding(tokens, table)
    cos, sin = rope_tables(config, tokens.shape[-1])
    for layer in range(config.layers):
        hidden = decoder_layer(hidden, load_layer(source, config, layer), config, cos, sin)
    norm = _read(source, names[Kind.FINAL_NORM])
    if not config.tied:
        table = _read(source, names[Kind.HEAD])
    return head(hidden, norm, table, config)


def _read(source: Weights, name: str) -> Tensor:
    return torch.from_numpy(np.require(source.rows(name), np.float32, ["C", "W"]))


def _attention(
    hidden: Tensor,
    layer: LayerWeights,
    config: DecoderConfig,
    cos: Tensor,
    sin: Tensor,
    capture: Capture,
) -> Tensor:
    windows, length, _ = hidden.shape
    capture(Kind.Q, hidden)

    def heads(kind: Kind, norm: Kind | None = None) -> Tensor:
        """(windows, heads, length, head_dim)"""
        states = functional.linear(hidden, *layer[kind])
        states = states.view(windows, length, -1, config.head_dim)
        if norm is not None and config.family.qk_norm:
            states = _rms_norm(states, layer[norm], config)
        return states.transpose(1, 2)

    query = _rotate(heads(Kind.Q, Kind.Q_NORM), cos, sin)
    key = _repeat_heads(_rotate(heads(Kind.K, Kind.K_NORM), cos, sin), config)
    value = _repeat_heads(heads(Kind.V), config)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(windows, length, config.heads * config.head_dim)
    capture(Kind.ATTENTION_OUTPUT, mixed)
    return functional.linear(mixed, *layer[Kind.ATTENTION_OUTPUT])


def _feed_forward(hidden: Tensor, layer: LayerWeights, capture: Capture) -> Tensor:
    capture(Kind.GATE, hidden)
    gate = functional.silu(functional.linear(hidden, *layer[Kind.GATE]))
    inner = gate * functional.linear(hidden, *layer[Kind.UP])
    capture(Kind.DOWN, inner)
    return functional.linear(inner, *layer[Kind.DOWN])


def _rms_norm(hidden: Tensor, norm: Parameters, config: DecoderConfig) -> Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return norm.weight * (hidden * torch.rsqrt(variance + config.rms_norm_eps))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def _repeat_heads(states: Tensor, config: DecoderConfig) -> Tensor:
    """Each key or value head once for every query head that shares it (expand: traceable)."""
    windows, heads, length, size = states.shape
    shared = config.heads // config.kv_heads
    expanded = states[:, :, None].expand(windows, heads, shared, length, size)
    return expanded.reshape(windows, heads * shared, length, size)


def _ignore(kind: Kind, states: Tensor) -> None:
    """The capture of a plain forward pass."""
