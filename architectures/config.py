"""A Hugging Face config.json as a DecoderConfig; what is not understood is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import BadInput, Unsupported
from .families import COMMON_KEYS, FAMILIES, Family
from .fields import flag, not_held, optional, real, whole
from .rope import Rope, read_ropes

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer's attention looks at.

    Attributes:
        rope: None: q and k are not rotated.
        window: how many positions a token sees, its own among them; None: all before it.
    """

    rope: Rope | None
    window: int | None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The mathematics of a decoder-only transformer with RMSNorm, RoPE, GQA and a gated FFN.

    Attributes:
        context_length: the longest text that the decoder is for.
        rope: of the layers that have no window; `local_rope` of those that have, if not the same.
        window: of the layers where `windowed` says so.
        rotated: whether a layer rotates q and k.
        attention_scale: what scores are multiplied by before the softmax.
        attention_softcap, logits_softcap: cap * tanh(x / cap), of scores and logits.
        embedding_multiplier, residual_multiplier, logits_divisor: of embeddings, of what attention
            and feed-forward network add, and of logits.
        reward: whether it ends in one score of the whole text, and not in logits.
        pad_id: a reward model scores at the last token that is not this one; None: at the last.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_scale: float
    local_rope: Rope | None
    window: int | None
    windowed: tuple[bool, ...]
    rotated: tuple[bool, ...]
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits_divisor: float
    reward: bool = False
    pad_id: int | None = None

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different ropes of the layers, in their order."""
        found = (self.attention(layer).rope for layer in range(self.layers))
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def attentions(self) -> tuple[LayerAttention, ...]:
        """What layers look at: each that differs from those before it, in their order."""
        return tuple(dict.fromkeys(map(self.attention, range(self.layers))))

    def attention(self, layer: int) -> LayerAttention:
        """What the attention of a layer looks at."""
        windowed = self.windowed[layer]
        rope = self.local_rope if windowed and self.local_rope else self.rope
        return LayerAttention(
            rope if self.rotated[layer] else None, self.window if windowed else None
        )


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face config.json.

    Raises:
        Unsupported: an unknown family, or a key or value that changes the mathematics and is not
            understood; never ignored.
        BadInput: a size is missing, not a number, or contradicts another one.
    """
    family = _family(config)
    reward = _is_reward(config, family)
    _refuse_unknown(config, family)
    config = {**dict(family.defaults), **config}
    size = partial(whole, config)
    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), _layers(config)
    kv_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2 or (hidden % heads and not config.get("head_dim")):
        raise BadInput(
            f"config.json: hidden {hidden}, {heads} heads of {head_dim}, {kv_heads} kv heads",
            "heads must divide hidden, kv heads must divide heads, a head's size must be even",
            "correct config.json, or export another model",
        )
    attention_bias = flag(config, "attention_bias")
    window, windowed = _windows(config, family, layers)
    rope, local_rope = read_ropes(config, two=family.two_ropes)
    if rope.rotated(head_dim) not in range(2, head_dim + 1, 2):
        raise not_held("partial_rotary_factor", rope.share, f"an even part of {head_dim}")
    pairs = rope.rotated(head_dim) // 2
    if rope.kind == "longrope" and {len(rope.short_factors), len(rope.long_factors)} != {pairs}:
        found = [len(rope.short_factors), len(rope.long_factors)]
        raise not_held("lengths of short_factor and long_factor", found, f"{pairs} of each")
    context = size("max_position_embeddings")
    if rope.kind == "longrope":  # beyond, transformers turns at other rates, in the past too
        context = min(context, rope.original_context)
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        rms_norm_eps=real(config, "rms_norm_eps"),
        rope=rope,
        tied=flag(config, "tie_word_embeddings") and not reward,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=flag(config, "mlp_bias"),
        attention_scale=_attention_scale(config, head_dim),
        local_rope=local_rope,
        window=window,
        windowed=windowed,
        rotated=_rotated(config, family, layers),
        attention_softcap=optional(config, "attn_logit_softcapping"),
        logits_softcap=optional(config, "final_logit_softcapping"),
        embedding_multiplier=(
            math.sqrt(hidden)
            if family.scaled_embedding
            else real(config, "embedding_multiplier", 1)
        ),
        residual_multiplier=real(config, "residual_multiplier", 1),
        logits_divisor=real(config, "logits_scaling", 1),
        reward=reward,
        pad_id=_pad_id(config, size("vocab_size")) if reward else None,
    )


def reward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the reward model that a causal language model becomes with a score head.

    Raises:
        Unsupported: transformers has no such model of this family.
    """
    family = _family(config)
    if family.classifier is None:
        raise Unsupported(
            f"a {family.model_type} model cannot be a reward model",
            "transformers has no sequence classification for this family",
            "train the reward model on a base of another family",
        )
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**config, **labels, "architectures": [family.classifier]}


_MOST_LAYERS = 1 << 16


def _layers(config: Mapping[str, Any]) -> int:
    layers = whole(config, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise BadInput(
            f"config.json: num_hidden_layers = {layers}",
            f"no decoder has more than {_MOST_LAYERS} layers",
            "take config.json from where the model was trained",
        )
    return layers


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise Unsupported(
            f"model family {model_type!r} is not supported",
            f"slimport knows the decoder families {', '.join(sorted(FAMILIES))}",
            "export a model of one of these families",
        )
    return FAMILIES[model_type]


def _is_reward(config: Mapping[str, Any], family: Family) -> bool:
    """Whether it is the family's reward model, and not its causal language model."""
    named = config.get("architectures") or [family.architecture]
    if named == [family.architecture]:
        return False
    if named != [family.classifier]:
        kinds = [family.architecture, *([family.classifier] if family.classifier else [])]
        raise Unsupported(
            f"architecture {named!r} is not supported",
            f"a {family.model_type} model must be a {' or a '.join(kinds)}",
            "export the causal language model itself, or a reward model",
        )
    labels = config.get("id2label")
    counts = {len(labels)} if isinstance(labels, Mapping) else set()
    counts |= {config["num_labels"]} if type(config.get("num_labels")) is int else set()
    if (counts or {2}) != {1}:  # transformers takes two for granted
        raise not_held("number of labels", sorted(counts or {2}), "one score, a reward model's,")
    return True


def _pad_id(config: Mapping[str, Any], vocabulary: int) -> int | None:
    pad = config.get("pad_token_id")
    if pad is not None and (type(pad) is not int or not 0 <= pad < vocabulary):
        raise not_held("pad_token_id", pad, f"an id below {vocabulary}, or none,")
    return pad


def _refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    understood = COMMON_KEYS | family.keys
    for key, value in config.items():
        if key in understood or key.startswith("_") or value is None or value is False:
            continue
        raise Unsupported(
            f"config.json: {key} = {value!r} is not understood for {family.model_type}",
            "it may change the mathematics of the model, and nothing is ignored silently",
            f"remove {key} from config.json if the forward pass does not depend on it",
        )
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if value is not None and value not in tuple(family.activations):  # it may be unhashable
            raise not_held(key, value, " or ".join(sorted(family.activations)))
    if config.get("is_causal", True) is not True:  # transformers takes its absence for true
        raise not_held("is_causal", config["is_causal"], "true")
    for key in ("use_sliding_window", "use_bidirectional_attention"):
        if config.get(key):
            raise not_held(key, True, "false")
    if config.get("quantization_config"):
        raise Unsupported(
            "config.json: the checkpoint is already quantized (quantization_config)",
            "weights are quantized once, from full precision",
            "export the full-precision model that it was made from",
        )


def _windows(
    config: Mapping[str, Any], family: Family, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and the layers that have it."""
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (_SLIDING, _FULL) for kind in kinds)
    ):
        raise not_held("layer_types", kinds, f"{_SLIDING} or {_FULL} for each layer")
    if family.full_period is None:
        if kinds is not None and _SLIDING in kinds and not family.all_windowed:
            raise not_held("layer_types", kinds, f"{_FULL} in every layer")
        if family.all_windowed and config.get("sliding_window") is not None:
            return whole(config, "sliding_window"), (True,) * layers
        return None, (False,) * layers
    if kinds is None:
        period = whole(config, "sliding_window_pattern", family.full_period)
        return whole(config, "sliding_window"), tuple((i + 1) % period > 0 for i in range(layers))
    windowed = tuple(kind == _SLIDING for kind in kinds)
    return (whole(config, "sliding_window") if any(windowed) else None), windowed


def _rotated(config: Mapping[str, Any], family: Family, layers: int) -> tuple[bool, ...]:
    """Whether each layer rotates q and k."""
    if family.no_rope_period is None:
        return (True,) * layers
    given = config.get("no_rope_layers")
    if given is None:
        period = whole(config, "no_rope_layer_interval", family.no_rope_period)
        return tuple((i + 1) % period > 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or any(g not in (0, 1) for g in given):
        raise not_held("no_rope_layers", given, "0 or 1 for each layer")
    return tuple(bool(rotated) for rotated in given[:layers])


def _attention_scale(config: Mapping[str, Any], head_dim: int) -> float:
    if config.get("attention_multiplier") is not None:
        return real(config, "attention_multiplier")
    return 1 / math.sqrt(real(config, "query_pre_attn_scalar", head_dim))
