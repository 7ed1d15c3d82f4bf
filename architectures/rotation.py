"""By how much a rope turns the pairs of a head: the scalings of `modeling_rope_utils.py`.

float32 like transformers, but for powers: those are taken in float64, so that every CPU gets the
same numbers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .rope import Rope

Float32 = npt.NDArray[np.float32]


def angles(rope: Rope, head_dim: int, length: int) -> Float32:
    """Radians of each pair at the positions below `length`: (length, rotated / 2)."""
    positions = np.arange(length, dtype=np.float32)
    return positions[:, None] * frequencies(rope, rope.rotated(head_dim))


def turns(rope: Rope, head_dim: int, length: int) -> tuple[Float32, Float32]:
    """Scaled cosines and sines of the positions below `length`: (length, rotated / 2) each."""
    turned = angles(rope, head_dim, length).astype(np.float64)
    scale = np.float32(rotation_scale(rope))
    return np.cos(turned).astype(np.float32) * scale, np.sin(turned).astype(np.float32) * scale


def rotation_scale(rope: Rope) -> float:
    """What cosines and sines are multiplied by; yarn's by Peng et al. 2023 (arXiv:2309.00071)."""
    yarn = rope.kind == "yarn" and rope.factor > 1
    return rope.attention_factor * (0.1 * math.log(rope.factor) + 1.0 if yarn else 1.0)


def frequencies(rope: Rope, rotated: int) -> Float32:
    """Radians per position of each pair: (rotated / 2,)."""
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    plain: Float32 = np.float32(1) / powers
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "longrope":
        factors: Float32 = np.array(rope.short_factors, np.float32)
        return plain / factors
    # Long wavelengths are stretched, short ones kept, those between blended.
    if rope.kind == "llama3":
        turns = np.float32(rope.original_context) * plain / np.float32(2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = (turns - np.float32(rope.low_freq_factor)) / np.float32(span)
    else:
        first = math.floor(_yarn_pair(rope, rotated, rope.beta_fast))
        last = math.ceil(_yarn_pair(rope, rotated, rope.beta_slow))
        start, end = max(first, 0), min(last, rotated - 1)
        pairs = np.arange(rotated // 2, dtype=np.float32)
        kept = np.float32(1) - (pairs - np.float32(start)) / np.float32(max(end - start, 0.001))
    kept = np.clip(kept, 0, 1)
    blended: Float32 = (np.float32(1) - kept) * plain / np.float32(rope.factor) + kept * plain
    return blended


def _yarn_pair(rope: Rope, rotated: int, turns: float) -> float:
    """The pair that turns so often within the original context."""
    return (
        rotated
        * math.log(rope.original_context / (turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
    )
