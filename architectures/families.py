"""What sets each decoder family apart. Adding a family is adding one entry (and a parity test).

Names of GGUF tensors are those of llama.cpp's gguf-py `constants.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]


class Kind(Enum):
    """What a weight does; the value is llama.cpp's name of it, but for GATE_UP: `ffn_up`."""

    EMBEDDING = "token_embd"
    HEAD = "output"
    SCORE = "cls.output"
    FINAL_NORM = "output_norm"
    ATTENTION_NORM = "attn_norm"
    Q = "attn_q"
    K = "attn_k"
    V = "attn_v"
    QKV = "attn_qkv"
    Q_NORM = "attn_q_norm"
    K_NORM = "attn_k_norm"
    ATTENTION_OUTPUT = "attn_output"
    ATTENTION_POST_NORM = "post_attention_norm"
    FFN_NORM = "ffn_norm"
    GATE = "ffn_gate"
    UP = "ffn_up"
    GATE_UP = "ffn_gate_up"
    DOWN = "ffn_down"
    FFN_POST_NORM = "post_ffw_norm"


Norms = tuple[tuple[Kind, str], ...]
# Which norms stand before and after attention and feed-forward network, and their modules.
BEFORE: Norms = (
    (Kind.ATTENTION_NORM, "input_layernorm"),
    (Kind.FFN_NORM, "post_attention_layernorm"),
)
AFTER: Norms = (
    (Kind.ATTENTION_POST_NORM, "post_attention_layernorm"),
    (Kind.FFN_POST_NORM, "post_feedforward_layernorm"),
)
BOTH: Norms = (
    (Kind.ATTENTION_NORM, "input_layernorm"),
    (Kind.FFN_NORM, "pre_feedforward_layernorm"),
    *AFTER,
)


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one decoder family apart.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the causal-LM class named in config.json.
        classifier: the class of reward models; None: transformers has none.
        gguf: llama.cpp's `general.architecture`.
        interleaved_rope: whether llama.cpp rotates neighbouring pairs, so q and k rows must be
            permuted from the half-split order of Hugging Face.
        qkv_bias: whether q, k and v have biases; None: `attention_bias` in config.json says.
        norms: the norms around attention and feed-forward network.
        qk_norm: whether q and k are normalized before the rotation, each head or the whole row.
        fused: whether q, k and v are one Linear, and gate and up another.
        norm_offset: what is added to the weight of a norm.
        activation: of the feed-forward network, and the names that config.json may give it.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        full_period: every how many layers one attends without a window, if config.json does not
            say; None: the family has no windows.
        no_rope_period: every how many layers one is not rotated; None: all are rotated.
        all_windowed: whether every layer has the window that config.json may name.
        two_ropes: whether layers with a window turn at a rate of their own.
        keys: config keys of this family beside COMMON_KEYS that are understood.
        defaults: what transformers takes for keys that config.json leaves out.
    """

    model_type: str
    architecture: str
    gguf: str
    classifier: str | None = None
    interleaved_rope: bool = False
    qkv_bias: bool | None = None
    norms: Norms = BEFORE
    qk_norm: Literal["head", "row"] | None = None
    fused: bool = False
    norm_offset: float = 0.0
    activation: Activation = "silu"
    activations: frozenset[str] = frozenset({"silu"})
    scaled_embedding: bool = False
    full_period: int | None = None
    no_rope_period: int | None = None
    all_windowed: bool = False
    two_ropes: bool = False
    keys: frozenset[str] = frozenset()
    defaults: tuple[tuple[str, Any], ...] = ()


_TANH = frozenset({"gelu_pytorch_tanh"})
_WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})
_GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    "gemma",
    "GemmaForSequenceClassification",
    norm_offset=1.0,
    activation="gelu_tanh",
    activations=_TANH | {"gelu"},  # transformers reads it as the approximation, here alone
    scaled_embedding=True,
    keys=frozenset({"hidden_activation", "use_bidirectional_attention"}),
    defaults=(("head_dim", 256), ("tie_word_embeddings", True), ("pad_token_id", 0)),
)
_GEMMA_KEYS = _GEMMA.keys | frozenset(
    """sliding_window sliding_window_pattern query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping cache_implementation rope_local_base_freq""".split()
)
_GEMMA_WINDOWS = (("query_pre_attn_scalar", 256), ("sliding_window", 4096))
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "llama",
            "LlamaForSequenceClassification",
            interleaved_rope=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            "llama",
            "MistralForSequenceClassification",
            interleaved_rope=True,
            qkv_bias=False,
            all_windowed=True,
            keys=frozenset({"sliding_window"}),
            defaults=(("sliding_window", 4096),),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "qwen2",
            "Qwen2ForSequenceClassification",
            qkv_bias=True,
            keys=_WINDOW,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            "qwen3",
            "Qwen3ForSequenceClassification",
            qk_norm="head",
            keys=_WINDOW,
            defaults=(("head_dim", 128),),
        ),
        _GEMMA,
        replace(
            _GEMMA,
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            classifier="Gemma2ForSequenceClassification",
            gguf="gemma2",
            norms=BOTH,
            activations=_TANH,
            full_period=2,
            keys=_GEMMA_KEYS,
            defaults=(
                *_GEMMA.defaults,
                *_GEMMA_WINDOWS,
                ("attn_logit_softcapping", 50.0),
                ("final_logit_softcapping", 30.0),
            ),
        ),
        replace(
            _GEMMA,
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            classifier="Gemma3TextForSequenceClassification",
            gguf="gemma3",
            norms=BOTH,
            qk_norm="head",
            activations=_TANH,
            full_period=6,
            two_ropes=True,
            keys=_GEMMA_KEYS,
            defaults=(*_GEMMA.defaults, *_GEMMA_WINDOWS, ("rope_theta", 1e6)),
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            "smollm3",
            "SmolLM3ForSequenceClassification",
            interleaved_rope=True,
            no_rope_period=4,
            keys=_WINDOW | {"no_rope_layers", "no_rope_layer_interval"},
            defaults=(
                ("rope_theta", 2e6),
                ("num_key_value_heads", 4),
                ("tie_word_embeddings", True),
                ("pad_token_id", 128004),
            ),
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            "phi3",
            "Phi3ForSequenceClassification",
            qkv_bias=False,
            fused=True,
            all_windowed=True,
            keys=frozenset(
                """sliding_window original_max_position_embeddings partial_rotary_factor resid_pdrop
                embd_pdrop full_attn_mod interpolate_factor auto_map""".split()
            ),
            defaults=(("original_max_position_embeddings", 4096), ("pad_token_id", 32000)),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            "olmo2",
            "Olmo2ForSequenceClassification",
            norms=AFTER,
            qk_norm="row",
            defaults=(("pad_token_id", 1),),
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            "granite",
            interleaved_rope=True,
            keys=frozenset(
                """embedding_multiplier logits_scaling residual_multiplier attention_multiplier
                """.split()
            ),
            defaults=(("attention_multiplier", 1.0),),
        ),
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
    num_labels tokenizer_class prefix unsloth_fixed unsloth_version quantization_config is_causal
    is_llama_config transformers.js_config""".split()
)
