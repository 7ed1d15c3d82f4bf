"""What the attention of a layer knows of positions, and what it keeps of those before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..architectures import DecoderConfig, LayerAttention
from ..architectures.rotation import angles, rotation_scale


class Tables(NamedTuple):
    """What the attention of one layer needs to know of positions.

    Attributes:
        cos, sin: (length, rotated), the second half of the columns repeats the first: heads are
            rotated in halves, as in Hugging Face checkpoints. None: nothing is rotated.
        seen: bool (length, positions read), whether a position (row) sees another; None: all
            before it.
    """

    cos: Tensor | None
    sin: Tensor | None
    seen: Tensor | None


class Cache(NamedTuple):
    """What the attention of one layer has read, for all positions of a context.

    Attributes:
        keys, values: (windows, kv_heads, context, head_dim), written in place.
        positions: int64 (length,), where the keys and values of this run go.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


def attention_tables(config: DecoderConfig, length: int) -> list[Tables]:
    """The tables of every layer for windows of `length`; layers that look alike share them."""
    made: dict[LayerAttention, Tables] = {}
    found = []
    for layer in range(config.layers):
        attention = config.attention(layer)
        if attention not in made:
            seen = None
            if attention.window is not None and attention.window < length:
                places = torch.arange(length)
                seen = seen_from(places, places, attention.window)
            made[attention] = Tables(*rotations(attention, config.head_dim, length), seen)
        found.append(made[attention])
    return found


def rotations(
    attention: LayerAttention, head_dim: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines of `Tables` for the positions below `length`; None: nothing is rotated."""
    if attention.rope is None:
        return None, None
    turned = torch.from_numpy(angles(attention.rope, head_dim, length))
    turned = torch.cat((turned, turned), dim=-1)
    scale = rotation_scale(attention.rope)
    return turned.cos() * scale, turned.sin() * scale


def seen_from(positions: Tensor, others: Tensor, window: int | None) -> Tensor:
    """Whether each of `positions` (rows) sees each of `others`: itself and those before it.

    With a `window` only its last positions are seen, itself among them.
    """
    ahead = positions[:, None] - others
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
