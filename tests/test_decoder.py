"""decoder.py against transformers, on a tiny random model of every family and variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from slimport import decoder
from slimport.architectures import FAMILIES, Kind, decoder_config
from slimport.quantize.grid import Float32

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 16},
    "llama-no-gqa": {"model_type": "llama", "num_key_value_heads": 6},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-llama3": {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "llama-yarn": {"model_type": "llama", "head_dim": 16, "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 256},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 32},
    "gemma2-scaled": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 64,
        "query_pre_attn_scalar": 100,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 32},
    "gemma3-linear": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "phi3-long": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
}


class Arrays:
    """A state dict as Weights."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        return self.tensors[name][start:stop]


def random_model(variant: str) -> transformers.PreTrainedModel:
    """Every tensor random, norms and biases too, large enough that each one moves the logits."""
    fields = SHAPE | VARIANTS[variant]
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            spread = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
            tensor.normal_(1.0 if "norm" in name else 0.0, spread)
    return model


def test_every_family_is_here() -> None:
    assert {fields["model_type"] for fields in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str) -> None:
    model = random_model(variant)
    tokens = torch.randint(0, 96, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    actual = decoder.logits(tokens, Arrays(model), decoder_config(model.config.to_dict()))
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < 1e-5


TOKENS = torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(1))
RUNS = [slice(0, 60)], [slice(0, 25), *(slice(n, n + 1) for n in range(25, 50)), slice(50, 60)]


def cached(model: transformers.PreTrainedModel, context: int = 64) -> decoder.CachedDecoder:
    config = decoder_config(model.config.to_dict())
    return decoder.CachedDecoder(Arrays(model), config, context)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("runs", RUNS, ids=["prefill", "token by token"])
def test_with_a_cache_logits_are_those_of_transformers(variant: str, runs: list[slice]) -> None:
    model = random_model(variant)
    ours, past = cached(model), transformers.DynamicCache(config=model.config)
    for run in runs:
        with torch.no_grad():
            expected = model(TOKENS[:, run], past_key_values=past).logits
        actual = ours(TOKENS[:, run], torch.tensor([run.start]))
        assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["llama-tied", "phi3-long", "gemma2", "gemma3", "granite"])
def test_the_cached_decoder_can_be_traced_for_any_number_of_tokens(variant: str) -> None:
    model = cached(random_model(variant))
    length = torch.export.Dim("length", min=1, max=63)
    traced = torch.export.export(
        cached(random_model(variant)),
        (TOKENS[:, :3], torch.tensor([0])),
        dynamic_shapes=({1: length}, None),
        strict=False,
    ).module()
    for run in RUNS[1][:5]:
        given = TOKENS[:, run], torch.tensor([run.start])
        assert (traced(*given) - model(*given)).abs().max() < 1e-5


def test_weights_keep_their_names_and_a_context_ends_where_it_ends() -> None:
    model = random_model("llama")
    ours = cached(model, 61)
    assert set(ours.state_dict()) == set(model.state_dict())
    with pytest.raises(IndexError):
        ours(TOKENS, torch.tensor([2]))


def test_captured_inputs_are_those_of_the_linears() -> None:
    model = random_model("qwen3")
    config = decoder_config(model.config.to_dict())
    tokens = torch.arange(40).view(2, 20)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("layernorm"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0]})
            )
    captured: dict[Kind, torch.Tensor] = {}
    with torch.no_grad():
        model(tokens)
        decoder.decoder_layer(
            model.model.embed_tokens(tokens),
            decoder.load_layer(Arrays(model), config, 0),
            config,
            decoder.attention_tables(config, 20)[0],
            captured.__setitem__,
        )
    modules = {
        Kind.Q: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        Kind.ATTENTION_OUTPUT: ["self_attn.o_proj"],
        Kind.GATE: ["mlp.gate_proj", "mlp.up_proj"],
        Kind.DOWN: ["mlp.down_proj"],
        Kind.ATTENTION_NORM: ["input_layernorm"],
        Kind.FFN_NORM: ["post_attention_layernorm"],
    }
    assert set(captured) == set(modules)
    for kind, names in modules.items():
        for name in names:
            torch.testing.assert_close(captured[kind], seen[name], atol=1e-5, rtol=1e-5)


def test_layers_that_look_alike_share_their_tables() -> None:
    fields = SHAPE | VARIANTS["gemma3-linear"]
    config = decoder_config(
        {**fields, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}
    )
    first, second, third = decoder.attention_tables(config, 50)
    assert first is second and first.seen is None
    assert third.seen is not None and third.seen.sum(-1).tolist() == [*range(1, 33), *[32] * 18]
    assert decoder.attention_tables(config, 32)[2].seen is None


def test_replaced_weights_are_used() -> None:
    model = random_model("llama")
    config = decoder_config(model.config.to_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    zeros = torch.zeros(80, 48)
    layer = decoder.load_layer(Arrays(model), config, 1, {name: zeros})
    assert layer[Kind.UP].weight is zeros
    assert layer[Kind.GATE].weight.abs().sum() > 0
