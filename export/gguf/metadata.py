"""What a GGUF file says about its model: llama.cpp's keys (gguf-py `constants.py`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from gguf import LlamaFileType

from ...architectures import DecoderConfig, Rope
from ...quantize.ggml import Type
from ...quantize.grid import Float32
from ...quantize.mixes import MIXES
from ...quantize.plan import Plan
from .writer import TensorInfo, Value

QUANTIZATION_VERSION = 2


def model_metadata(
    config: DecoderConfig, name: str, plan: Plan, tensors: list[TensorInfo]
) -> dict[str, Value]:
    """Keys of the model; `name` is for people and never a path."""
    values: dict[str, Value] = {
        "general.architecture": config.family.gguf,
        "general.type": "model",
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": int(_file_type(plan, tensors)),
    }
    # llama.cpp strips spaces around special tokens of any model with this in its name.
    if not any(mark in name.lower() for mark in ("phi3", "phi-3")):
        values["general.name"] = name
    hyper: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rope.rotated(config.head_dim),
        "rope.freq_base": config.rope.theta,
    }
    hyper |= _rope_scaling(config.rope)
    if config.window is not None:
        hyper["attention.sliding_window"] = config.window
    if config.family.two_ropes:
        # Without the first, llama.cpp takes every sixth layer for one without a window.
        period = full_period(config.windowed)
        assert period is not None and config.local_rope is not None, "layout.py refuses others"
        hyper["attention.sliding_window_pattern"] = period
        hyper["rope.freq_base_swa"] = config.local_rope.theta
    if config.attention_softcap is not None:
        hyper["attn_logit_softcapping"] = config.attention_softcap
    if config.logits_softcap is not None:
        hyper["final_logit_softcapping"] = config.logits_softcap
    if config.family.gguf == "granite":
        hyper |= {
            "attention.scale": config.attention_scale,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_divisor,
        }
    return values | {f"{config.family.gguf}.{key}": value for key, value in hyper.items()}


def full_period(windowed: Sequence[bool]) -> int | None:
    """Every how many layers, counted from 1, one has no window; 0: all have one; None: no rule."""
    if all(windowed):
        return 0
    period = list(windowed).index(False) + 1
    regular = [(layer + 1) % period > 0 for layer in range(len(windowed))]
    return period if list(windowed) == regular else None


def _rope_scaling(rope: Rope) -> dict[str, Value]:
    if rope.kind == "longrope":
        return {
            "rope.scaling.attn_factor": rope.attention_factor,
            "rope.scaling.original_context_length": rope.original_context,
        }
    if rope.kind not in ("linear", "yarn"):
        return {}
    keys: dict[str, Value] = {"type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        keys |= {
            "original_context_length": rope.original_context,
            "yarn_beta_fast": rope.beta_fast,
            "yarn_beta_slow": rope.beta_slow,
        }
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def rope_tensors(rope: Rope, head_dim: int) -> dict[str, Float32]:
    """Tensors of what each frequency is divided by, where it is not one number: float32."""
    if rope.kind == "llama3":
        return {"rope_freqs.weight": rope_factors(rope, head_dim)}
    if rope.kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope.long_factors, np.float32),
            "rope_factors_short.weight": np.array(rope.short_factors, np.float32),
        }
    return {}


def rope_factors(rope: Rope, head_dim: int) -> Float32:
    """What llama3 rope divides each frequency by: float32 (head_dim / 2,).

    From Llama 3.1's reference code: long wavelengths are slowed by `factor`, short ones kept, and
    those between are mixed.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelength = 2 * math.pi * rope.theta**exponent
    turns = rope.original_context / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    factors: Float32 = (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)
    return factors


def _file_type(plan: Plan, tensors: list[TensorInfo]) -> LlamaFileType:
    """The mix, or else the type of most weights; gguf-py does not name every type."""
    named = LlamaFileType.__members__
    if plan.preset in MIXES:
        main = plan.preset
    else:
        weights: Counter[Type] = Counter()
        for info in tensors:
            weights[info.type] += math.prod(info.shape)
        main = weights.most_common(1)[0][0].name
    return named.get(f"MOSTLY_{main}", named.get(f"ALL_{main}", LlamaFileType.GUESSED))
