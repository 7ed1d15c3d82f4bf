"""Decoder families as data: a Hugging Face config becomes a DecoderConfig and a list of weights.

Adding a family is adding one entry to FAMILIES (and a parity test). Names of GGUF tensors and keys
are those of llama.cpp's gguf-py `constants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal, cast

from .checkpoint import Weights
from .errors import BadInput, Unsupported


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
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED_ROWS = 4096
_LARGEST = 1e38  # of float32, as containers hold such a number; sizes are 32-bit integers there


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
    found = [Weight(EMBEDDING, table, Kind.EMBEDDING, None)]
    for layer in range(config.layers):
        found += _layer_weights(config, layer)
    norm = (config.hidden_size,)
    found.append(Weight("model.norm.weight", norm, Kind.FINAL_NORM, None))
    if not config.tied:
        found.append(Weight(HEAD, table, Kind.HEAD, None))
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


def check_weights(config: DecoderConfig, checkpoint: Weights) -> None:
    """Compare the names and shapes of a checkpoint with what its config demands.

    Two kinds of tensors may be left over: rotary frequencies, which follow from the config, and a
    head equal to the embedding it is tied to.

    Raises:
        BadInput: a tensor is missing, has another shape, or is left over.
    """
    names = set(checkpoint.names())
    if config.layers > len(names):  # before a wild number becomes a list of names
        raise _inconsistent(f"{len(names)} tensors are too few for {config.layers} layers")
    wanted = weights(config)
    if missing := [weight.name for weight in wanted if weight.name not in names]:
        raise _inconsistent(f"{len(missing)} tensors are missing, such as {missing[0]}")
    for weight in wanted:
        if checkpoint.shape(weight.name) != weight.shape:
            found = checkpoint.shape(weight.name)
            raise _inconsistent(f"{weight.name} has shape {found}, config.json says {weight.shape}")
    leftover = names - {weight.name for weight in wanted}
    leftover = {name for name in leftover if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and HEAD in leftover:
        _compare_tied(config, checkpoint)
        leftover.discard(HEAD)
    if leftover:
        raise _inconsistent(
            f"{len(leftover)} tensors are left over, such as {min(leftover)}: their effect is lost"
        )


def _compare_tied(config: DecoderConfig, checkpoint: Weights) -> None:
    """Refuse a head that differs from its embedding; reads both, row block by row block."""
    for start in range(0, config.vocab_size, _TIED_ROWS):
        stop = start + _TIED_ROWS
        head, table = (checkpoint.rows(name, start, stop) for name in (HEAD, EMBEDDING))
        if head.shape != table.shape or (head != table).any():
            raise _inconsistent(
                f"{HEAD} differs from {EMBEDDING}, and config.json says they are tied",
                "set tie_word_embeddings to false if the head was trained on its own",
            )


def _inconsistent(
    why: str, cure: str = "give the folder of one whole model, with the config.json it was saved by"
) -> BadInput:
    return BadInput("weights and config.json do not belong together", why, cure)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face config.json.

    Raises:
        Unsupported: an unknown family, or a key or value that changes the mathematics and is not
            understood; never ignored.
        BadInput: a size is missing, not a number, or contradicts another one.
    """
    family = _family(config)
    _refuse_unknown(config, family)
    size = partial(_whole, config)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2 or (hidden % heads and not config.get("head_dim")):
        raise BadInput(
            f"config.json: hidden {hidden}, {heads} heads of {head_dim}, {kv_heads} kv heads",
            "heads must divide hidden, kv heads must divide heads, a head's size must be even",
            "correct config.json, or export another model",
        )
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=size("max_position_embeddings"),
        rms_norm_eps=_real(config, "rms_norm_eps"),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise Unsupported(
            f"model family {model_type!r} is not supported",
            f"slimport knows the decoder families {', '.join(sorted(FAMILIES))}",
            "export a model of one of these families",
        )
    family = FAMILIES[model_type]
    named = config.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        raise Unsupported(
            f"architecture {named!r} is not supported",
            f"a {model_type} model must be a {family.architecture}",
            "export the causal language model itself",
        )
    return family


def _real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; None and absent are the same."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        fault = "is missing" if value is None else f"= {value!r:.40} is not a positive number"
        raise BadInput(
            f"config.json: {key} {fault}",
            "the sizes of the model come from config.json, and none is guessed",
            "take config.json from where the model was trained",
        )
    return float(value)


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _real(config, key, default)
    if not (value.is_integer() and value < 2**31):
        raise BadInput(
            f"config.json: {key} = {value} is not a whole number below 2^31",
            "it is a size",
            "take config.json from where the model was trained",
        )
    return int(value)


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
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        raise _not_held("layer_types", layer_types, "full_attention in every layer")
    if config.get("quantization_config"):
        raise Unsupported(
            "config.json: the checkpoint is already quantized (quantization_config)",
            "weights are quantized once, from full precision",
            "export the full-precision model that it was made from",
        )


# Keys of config.json to fields of Rope.
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context",
    },
}


def _rope(config: Mapping[str, Any]) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise _not_held(key, given, "an object")
        scaling |= given
    theta = _real(scaling, "rope_theta", _real(config, "rope_theta", 10000.0))
    scaling.pop("rope_theta", None)
    old_name = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or old_name or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise _not_held("rope_type", kind, ", ".join(_ROPE_KEYS))
    wanted = _ROPE_KEYS[kind]
    if odd := sorted(set(scaling) ^ set(wanted)):
        fault = "has no" if odd[0] in wanted else "does not know"
        raise Unsupported(
            f"config.json: rope of type {kind} {fault} {odd[0]}",
            f"its keys are {', '.join(wanted) or 'none but rope_theta'}",
            "take config.json from where the model was trained",
        )
    values = {field: _real(scaling, key) for key, field in wanted.items()}
    if "original_context" in values:
        values["original_context"] = _whole(scaling, "original_max_position_embeddings")
    return Rope(theta=theta, kind=cast(Any, kind), **cast(Any, values))


def _not_held(key: str, value: object, held: str) -> Unsupported:
    return Unsupported(
        f"config.json: {key} = {value!r} is not supported",
        f"slimport holds {held} here exactly, and nothing else",
        "export a model without it",
    )
