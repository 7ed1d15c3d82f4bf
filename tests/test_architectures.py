"""Configs are read as transformers reads them; what contradicts or is not understood is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from slimport.architectures import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    Kind,
    Rope,
    check_weights,
    decoder_config,
    reward_config,
    weights,
)
from slimport.checkpoint import Checkpoint, Float32
from slimport.errors import BadInput, SlimportError, Unsupported
from slimport.export import gguf
from slimport.export.gguf import layout
from slimport.quantize.plan import make_plan

REWARD = "LlamaForSequenceClassification"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class Arrays:
    """Weights from a dict of arrays."""

    def __init__(self, arrays: dict[str, Float32]) -> None:
        self.arrays = arrays

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        return self.arrays[name][start:stop]


def arrays(config: dict[str, Any]) -> dict[str, Float32]:
    rng = np.random.default_rng(0)
    wanted = weights(decoder_config(config))
    return {w.name: rng.standard_normal(w.shape).astype(np.float32) for w in wanted}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_transformers(make_model: Any, family: str, tied: bool) -> None:
    folder = make_model(family, tie_word_embeddings=tied)
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if tied:
        expected.pop(HEAD)
    assert {weight.name: weight.shape for weight in weights(config)} == expected
    check_weights(config, Checkpoint.open(folder))


def test_biases_follow_the_family_and_the_config() -> None:
    config = decoder_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    biases = {w.kind for w in weights(config) if w.name.endswith(".bias")}
    assert biases == {
        Kind.Q,
        Kind.K,
        Kind.V,
        Kind.ATTENTION_OUTPUT,
        Kind.GATE,
        Kind.UP,
        Kind.DOWN,
    }
    qwen2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    biases = {w.kind for w in weights(decoder_config(qwen2)) if w.name.endswith(".bias")}
    assert biases == {Kind.Q, Kind.K, Kind.V}


def test_llama_cpp_names() -> None:
    names = [weight.gguf for weight in weights(decoder_config(LLAMA))]
    assert names[:3] == ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"]
    assert names[-2:] == ["blk.1.ffn_down.weight", "output_norm.weight"]


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize(
    "value", [None, "16", True, -16, 0, [16], float("nan"), float("inf"), {"a": 1}]
)
def test_a_size_that_is_missing_or_no_number_is_named(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"config.json: {key} ") as error:
        decoder_config(LLAMA | {key: value})
    assert error.value.exit_code == 7
    with pytest.raises(BadInput, match=f"{key} is missing"):
        decoder_config({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16.5}, "hidden_size = 16.5 is not a whole number"),
        ({"num_key_value_heads": 3}, "hidden 16, 4 heads of 4, 3 kv heads"),
        ({"num_key_value_heads": 8}, "4 heads of 4, 8 kv heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden 16, 5 heads"),
        ({"head_dim": 7}, "4 heads of 7"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4' is not a positive number"),
    ],
)
def test_sizes_that_contradict_each_other(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        decoder_config(LLAMA | change)


def test_defaults_are_those_of_transformers() -> None:
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "architectures")}
    config = decoder_config(bare | {"head_dim": None, "tie_word_embeddings": False})
    assert (config.kv_heads, config.head_dim, config.tied) == (4, 4, False)
    assert config.rope == Rope(10000.0)
    assert decoder_config(LLAMA | {"head_dim": 32}).head_dim == 32


# config.json of published models, from their model cards; the weights are not here.
PUBLISHED = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_understood(name: str) -> None:
    """No key of theirs is refused, the weights are those of transformers, and GGUF holds them."""
    fields = dict(PUBLISHED[name])
    config = decoder_config(fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tied:
        expected.pop(HEAD)
    assert {weight.name: weight.shape for weight in weights(config)} == expected
    assert config.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    layout.tensor_infos(config, make_plan(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_reward_models_of_published_bases(name: str) -> None:
    """Their weights, and the token that they take for padding, are those of transformers."""
    if decoder_config(PUBLISHED[name]).family.classifier is None:
        with pytest.raises(Unsupported, match="cannot be a reward model"):
            reward_config(PUBLISHED[name])
        return
    fields = reward_config(PUBLISHED[name])
    config = decoder_config(fields)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**fields))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {weight.name: weight.shape for weight in weights(config)} == expected
    assert type(model).__name__ == config.family.classifier
    assert config.pad_id == model.config.pad_token_id
    assert config.reward and not config.tied


GEMMA2, GEMMA3 = PUBLISHED["gemma-2-2b-it"], PUBLISHED["gemma-3-1b-it"]
LINEAR = {"rope_type": "linear", "factor": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (GEMMA3 | {"rope_parameters": LINEAR}, "rope_parameters"),
        (GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 8}}, "rope_scaling"),
        (GEMMA3 | {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": {}}}, "rope_scal"),
    ],
)
def test_what_transformers_reads_otherwise_in_a_family_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        decoder_config(fields)


def test_granite_without_a_multiplier_is_not_scaled() -> None:
    fields = {k: v for k, v in PUBLISHED["granite-3.1-2b"].items() if k != "attention_multiplier"}
    assert decoder_config(fields).attention_scale == 1


def test_large_gemmas_scale_by_hidden_over_heads() -> None:
    large = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32}
    config = decoder_config(GEMMA2 | large | {"head_dim": 128, "query_pre_attn_scalar": 144})
    layout.tensor_infos(config, make_plan(config))


@pytest.mark.parametrize(
    ("name", "context"),
    [("Mistral-7B-v0.1", 4096), ("Phi-3-mini-4k", 2047), ("Phi-4-mini", 4096)],
)
def test_what_llama_cpp_has_no_window_or_rope_for_ends_the_context(name: str, context: int) -> None:
    assert gguf.context_length(decoder_config(PUBLISHED[name])) == context


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


LONG = {
    "type": "longrope",
    "short_factor": [1, 1],
    "long_factor": [1, 2],
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, "linear", 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32),
        ),
        (
            {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 7e5}},
            Rope(7e5, "llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        (
            {"rope_scaling": LONG},
            Rope(
                1e4,
                "longrope",
                2.0,
                original_context=32,
                attention_factor=math.sqrt(1.2),
                short_factors=(1.0, 1.0),
                long_factors=(1.0, 2.0),
            ),
        ),
        ({"rope_parameters": YARN}, Rope(1e4, "yarn", 4.0, original_context=32)),
        (
            {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
            Rope(1e4, "yarn", 4.0, original_context=32, beta_fast=16, beta_slow=2),
        ),
        (
            {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3", "type": "llama3"}},
            Rope(1e4, "llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_rope(keys: dict[str, Any], expected: Rope) -> None:
    assert decoder_config(LLAMA | keys).rope == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "TokenClassification"),
        ({"architectures": [REWARD]}, r"number of labels = \[2\]"),  # which transformers takes
        ({"architectures": [REWARD], "num_labels": 3}, r"number of labels = \[3\]"),
        ({"architectures": [REWARD], "num_labels": 1, "pad_token_id": 1 << 20}, "pad_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architecture 'LlamaForCausalLM'"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6 is not understood"),
        ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn has no original_max_posi"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type = \['linear'\]"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": YARN},
            "rope_scaling",
        ),
        ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 8}}, "beta_fast above beta_slow"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "a theta above 1"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor = 2.0"),
        ({"rope_scaling": LONG, "original_max_position_embeddings": 16}, "original_max_position"),
        ({"is_causal": False}, "is_causal = False"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'"),
        ({"attention_bias": "no"}, "attention_bias = 'no'"),
        ({"rope_scaling": LONG | {"attention_factor": 2}}, "attention_factor = 2"),
        ({"rope_scaling": LONG | {"short_factor": None}}, "short_factor = None"),
        ({"rope_scaling": LONG | {"short_factor": [1]}}, r"= \[1, 2\]"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "does not know attention_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "linear has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "does not know beta"),
        ({"rope_scaling": {"factor": 2}}, "default does not know factor"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message) as error:
        decoder_config(LLAMA | change)
    assert error.value.exit_code == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "head_dim", "layer_types")


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*LLAMA, *ROPE_KEYS, "hidden_act"]), JSON, max_size=3))
def test_no_config_escapes_as_another_error(changes: dict[str, Any]) -> None:
    try:
        config = decoder_config(LLAMA | changes)
    except SlimportError as error:
        assert error.exit_code in (5, 7)
    else:
        assert config.heads % config.kv_heads == 0


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_no_published_config_escapes_as_another_error(data: st.DataObject) -> None:
    fields = PUBLISHED[data.draw(st.sampled_from([*PUBLISHED]))]
    keys = st.sampled_from([*fields, "layer_types", "rope_scaling", "rope_parameters"])
    try:
        config = decoder_config(fields | data.draw(st.dictionaries(keys, JSON, max_size=2)))
        layout.tensor_infos(config, make_plan(config))
    except SlimportError as error:
        assert error.exit_code in (5, 7)
    else:
        assert len(config.windowed) == len(config.rotated) == config.layers


def test_missing_and_misshapen_tensors() -> None:
    config = decoder_config(LLAMA)
    found = arrays(LLAMA)
    check_weights(config, Arrays(found))
    name = "model.layers.1.self_attn.k_proj.weight"
    lost = {key: value for key, value in found.items() if key != name}
    with pytest.raises(BadInput, match=f"1 tensors are missing, such as {name}") as error:
        check_weights(config, Arrays(lost))
    assert error.value.exit_code == 7
    bent = found | {name: np.zeros((8, 15), np.float32)}
    with pytest.raises(BadInput, match=rf"{name} has shape \(8, 15\), config.json says \(8, 16\)"):
        check_weights(config, Arrays(bent))
    many = decoder_config(LLAMA | {"num_hidden_layers": 60000})
    with pytest.raises(BadInput, match="too few for 60000 layers"):
        check_weights(many, Arrays(found))
    with pytest.raises(BadInput, match="no decoder has more than 65536 layers"):
        decoder_config(LLAMA | {"num_hidden_layers": 10**9})


def test_leftover_tensors() -> None:
    config = decoder_config(LLAMA)
    found = arrays(LLAMA)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    check_weights(config, Arrays(found | frequencies))
    for name in ("model.layers.2.mlp.up_proj.weight", "score.weight", "extra.inv_freq"):
        with pytest.raises(BadInput, match=f"1 tensors are left over, such as {name}"):
            check_weights(config, Arrays(found | {name: np.ones((2, 2), np.float32)}))


def test_a_tied_head_may_be_stored_if_it_is_the_embedding() -> None:
    found = arrays(LLAMA)
    config = decoder_config(LLAMA)
    check_weights(config, Arrays(found | {HEAD: found[EMBEDDING].copy()}))
    other = found[EMBEDDING].copy()
    other[47, 15] += 1
    for head in (other, other[:40], other[:, :8]):
        with pytest.raises(BadInput, match=r"lm_head.weight differs from model.embed_tokens"):
            check_weights(config, Arrays(found | {HEAD: head}))
    untied = decoder_config(LLAMA | {"tie_word_embeddings": False})
    with pytest.raises(BadInput, match=r"such as lm_head\.weight"):
        check_weights(untied, Arrays(found))


@pytest.mark.parametrize("name", ["stories260K", "stories_char105", "manpages-3.7M"])
def test_trained_models_are_whole(name: str) -> None:
    folder = Path(__file__).parents[1] / "../shared/models" / name
    if not folder.exists():
        pytest.skip("the shared models are not here")
    checkpoint = Checkpoint.open(folder)
    check_weights(decoder_config(checkpoint.config), checkpoint)
