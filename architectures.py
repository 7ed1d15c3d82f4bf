"""Decoder families as data: a Hugging Face config becomes a DecoderConfig and a list of weights.

Adding a family is adding one entry to FAMILIES (and a parity test). Names of GGUF tensors and keys
are those of llama.cpp's gguf-py `constants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from .errors import Unsupported


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one decoder family apart.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the causal-LM class named in config.json.
        gguf: llama.cpp's `general.architecture`.
        interleaved_rope: whether llama.cpp rotates neighbouring pairs, so q and k rows must be
            permuted from the half-split order of Hugging Face.
        qkv_bias: whether q, k and v have biases; None: `attention_bias` in config.json says.
        qk_norm: whether q and k are normalized per head before the rotation.
        keys: config keys of this family beside COMMON_KEYS that are understood.
    """

    model_type: str
    architecture: str
    gguf: str
    interleaved_rope: bool
    qkv_bias: bool | None
    qk_norm: bool
    keys: frozenset[str] = frozenset()


_WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", True, None, False),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", False, True, False, _WINDOW_KEYS),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", False, None, True, _WINDOW_KEYS),
    )
}

# Understood for every family, or without effect on the forward pass.
COMMON_KEYS = frozenset(
    """model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias hidden_act layer_types
    attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype initializer_range
    pretraining_tp transformers_version use_cache return_dict output_attentions problem_type
    output_hidden_states chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id
    tokenizer_class prefix unsloth_fixed unsloth_version quantization_config""".split()
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    `factor` applies to linear and llama3; the other fields to llama3 only
    (transformers' `modeling_rope_utils.py`).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The mathematics of a decoder-only transformer with RMSNorm, RoPE, GQA and SwiGLU."""

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


class Kind(Enum):
    """What a weight does; the value is llama.cpp's name of it."""

    EMBEDDING = "token_embd"
    HEAD = "output"
    FINAL_NORM = "output_norm"
    ATTENTION_NORM = "attn_norm"
    Q = "attn_q"
    K = "attn_k"
    V = "attn_v"
    Q_NORM = "attn_q_norm"
    K_NORM = "attn_k_norm"
    ATTENTION_OUTPUT = "attn_output"
    FFN_NORM = "ffn_norm"
    GATE = "ffn_gate"
    UP = "ffn_up"
    DOWN = "ffn_down"


_MODULES = {
    Kind.ATTENTION_NORM: "input_layernorm",
    Kind.Q: "self_attn.q_proj",
    Kind.K: "self_attn.k_proj",
    Kind.V: "self_attn.v_proj",
    Kind.Q_NORM: "self_attn.q_norm",
    Kind.K_NORM: "self_attn.k_norm",
    Kind.ATTENTION_OUTPUT: "self_attn.o_proj",
    Kind.FFN_NORM: "post_attention_layernorm",
    Kind.GATE: "mlp.gate_proj",
    Kind.UP: "mlp.up_proj",
    Kind.DOWN: "mlp.down_proj",
}
TABLES = frozenset({Kind.EMBEDDING, Kind.HEAD})


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
        name: the source name, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: as in the checkpoint, (outputs, inputs) for a matrix.
        kind: what it does; a bias has the kind of its layer.
        layer: index of the decoder layer, None outside them.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def is_table(self) -> bool:
        """An embedding or a head: looked up or multiplied, one row per token."""
        return self.kind in TABLES

    @property
    def is_linear(self) -> bool:
        """A matrix inside a decoder layer."""
        return self.is_matrix and not self.is_table

    @property
    def gguf(self) -> str:
        """llama.cpp's name, such as `blk.0.attn_q.weight`."""
        prefix = "" if self.layer is None else f"blk.{self.layer}."
        return f"{prefix}{self.kind.value}.{self.name.rpartition('.')[2]}"


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Every tensor that a checkpoint of this decoder must have, in the order of the forward pass.

    A tied head is not listed: it is the embedding.
    """
    table = (config.vocab_size, config.hidden_size)
    found = [Weight("model.embed_tokens.weight", table, Kind.EMBEDDING, None)]
    for layer in range(config.layers):
        found += _layer_weights(config, layer)
    norm = (config.hidden_size,)
    found.append(Weight("model.norm.weight", norm, Kind.FINAL_NORM, None))
    if not config.tied:
        found.append(Weight("lm_head.weight", table, Kind.HEAD, None))
    return tuple(found)


def _layer_weights(config: DecoderConfig, layer: int) -> Iterator[Weight]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[Kind, tuple[int, ...]] = {
        Kind.ATTENTION_NORM: (hidden,),
        Kind.Q: (query, hidden),
        Kind.K: (key, hidden),
        Kind.V: (key, hidden),
        Kind.Q_NORM: (config.head_dim,),
        Kind.K_NORM: (config.head_dim,),
        Kind.ATTENTION_OUTPUT: (hidden, query),
        Kind.FFN_NORM: (hidden,),
        Kind.GATE: (ffn, hidden),
        Kind.UP: (ffn, hidden),
        Kind.DOWN: (hidden, ffn),
    }
    biased = {
        **dict.fromkeys((Kind.Q, Kind.K, Kind.V), config.qkv_bias),
        Kind.ATTENTION_OUTPUT: config.output_bias,
        **dict.fromkeys((Kind.GATE, Kind.UP, Kind.DOWN), config.mlp_bias),
    }
    for kind, module in _MODULES.items():
        if kind in (Kind.Q_NORM, Kind.K_NORM) and not config.family.qk_norm:
            continue
        stem = f"model.layers.{layer}.{module}"
        yield Weight(f"{stem}.weight", shapes[kind], kind, layer)
        if biased.get(kind, False):
            yield Weight(f"{stem}.bias", shapes[kind][:1], kind, layer)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face config.json.

    Raises:
        Unsupported: an unknown family, or a key or value that changes the mathematics and is not
            understood; never ignored.
    """
    family = _family(config)
    _refuse_unknown(config, family)
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        context_length=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    known = ", ".join(sorted(FAMILIES))
    if model_type not in FAMILIES:
        raise Unsupported(
            f"model family {model_type!r} is not supported",
            f"slimport knows the decoder families {known}",
            "export a model of one of these families",
        )
    family = FAMILIES[model_type]
    named = config.get("architectures") or [family.architecture]
    if list(named) != [family.architecture]:
        raise Unsupported(
            f"architecture {', '.join(named)} is not supported",
            f"a {model_type} model must be a {family.architecture}",
            "export the causal language model itself",
        )
    return family


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
    if config.get("hidden_act", "silu") != "silu":
        raise _not_held("hidden_act", config["hidden_act"], "silu")
    if config.get("use_sliding_window"):
        raise _not_held("use_sliding_window", True, "false")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise _not_held("layer_types", config["layer_types"], "full_attention in every layer")
    if config.get("quantization_config"):
        raise Unsupported(
            "config.json: the checkpoint is already quantized (quantization_config)",
            "weights are quantized once, from full precision",
            "export the full-precision model that it was made from",
        )


def _rope(config: Mapping[str, Any]) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    scaling = dict(config.get("rope_scaling") or {})
    scaling |= dict(config.get("rope_parameters") or {})
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    fields = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_context",
        },
    }
    if kind not in fields:
        raise _not_held("rope_type", kind, ", ".join(fields))
    unknown = sorted(set(scaling) - set(fields[kind]))
    missing = sorted(set(fields[kind]) - set(scaling))
    if unknown or missing:
        raise _not_held(f"rope of type {kind}: key", *((unknown or missing)[0],), "its own keys")
    values = {fields[kind][key]: value for key, value in scaling.items()}
    return Rope(theta=theta, kind=kind, **values)


def _not_held(key: str, value: object, held: str) -> Unsupported:
    return Unsupported(
        f"config.json: {key} = {value!r} is not supported",
        f"slimport holds {held} here exactly, and nothing else",
        "export a model without it",
    )
