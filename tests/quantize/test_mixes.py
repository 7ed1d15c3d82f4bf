"""llama.cpp's mixes, held to what its src/llama-quant.cpp says of each kind of weight."""

from __future__ import annotations

from typing import Any

import pytest

from slimport.architectures import DecoderConfig, Kind, decoder_config, weights
from slimport.errors import UsageError
from slimport.quantize.mixes import MIXES, wanted_type
from slimport.quantize.plan import make_plan

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
SHARED = {"num_key_value_heads": 2}  # four query heads share a key


def decoder(**changes: Any) -> DecoderConfig:
    return decoder_config(CONFIG | changes)


def types(mix: str, config: DecoderConfig, weighted: bool = True) -> dict[Kind, list[str]]:
    """Type names by kind, layer after layer."""
    found: dict[Kind, list[str]] = {}
    for weight in weights(config):
        if weight.is_matrix:
            name = wanted_type(mix, weight, config, weighted).name
            found.setdefault(weight.kind, []).append(name)
    return found


def per_layer(usual: str, other: str, layers: set[int]) -> list[str]:
    return [other if layer in layers else usual for layer in range(16)]


MORE = {0, 1, 4, 7, 10, 13, 14, 15}  # use_more_bits of 16 layers


@pytest.mark.parametrize(
    ("mix", "changes", "kind", "expected"),
    [
        ("Q4_K_M", {}, Kind.V, per_layer("Q4_K", "Q6_K", MORE)),
        ("Q4_K_M", {}, Kind.DOWN, per_layer("Q4_K", "Q6_K", MORE)),
        ("Q4_K_M", {}, Kind.Q, ["Q4_K"] * 16),
        ("Q4_K_M", {}, Kind.HEAD, ["Q6_K"]),
        ("Q4_K_M", {}, Kind.EMBEDDING, ["Q4_K"]),
        ("Q4_K_M", {"tie_word_embeddings": True}, Kind.EMBEDDING, ["Q6_K"]),
        ("Q5_K_M", {}, Kind.DOWN, per_layer("Q5_K", "Q6_K", MORE)),
        ("Q4_K_S", {}, Kind.V, per_layer("Q4_K", "Q5_K", {0, 1, 2, 3})),
        ("Q4_K_S", {}, Kind.DOWN, per_layer("Q4_K", "Q5_K", {0, 1})),
        ("Q3_K_S", {}, Kind.V, ["Q3_K"] * 16),
        ("Q3_K_M", {}, Kind.V, per_layer("Q4_K", "Q5_K", {0, 1})),
        ("Q3_K_M", {}, Kind.DOWN, per_layer("Q4_K", "Q5_K", {0})),
        ("Q3_K_M", {}, Kind.ATTENTION_OUTPUT, ["Q4_K"] * 16),
        ("Q3_K_L", {}, Kind.ATTENTION_OUTPUT, ["Q5_K"] * 16),
        ("Q2_K", {}, Kind.V, ["Q3_K"] * 16),
        ("Q2_K", SHARED, Kind.V, ["Q4_K"] * 16),
        ("Q2_K", {}, Kind.DOWN, ["Q3_K"] * 16),
        ("Q2_K", {}, Kind.UP, ["Q2_K"] * 16),
        ("Q2_K_S", {}, Kind.V, ["Q2_K"] * 16),
        ("Q2_K_S", {}, Kind.DOWN, per_layer("Q2_K", "Q4_K", {0, 1})),
        ("Q8_0", {}, Kind.HEAD, ["Q8_0"]),
        ("Q4_0", {}, Kind.DOWN, per_layer("Q4_0", "Q4_1", {0, 1})),
        ("IQ4_XS", {}, Kind.V, ["IQ4_XS"] * 16),
        ("IQ4_XS", SHARED, Kind.V, ["Q5_K"] * 16),
        ("IQ3_M", {}, Kind.ATTENTION_OUTPUT, ["Q4_K"] * 16),
        ("IQ3_XS", {}, Kind.UP, per_layer("IQ3_S", "IQ3_XXS", set(range(2, 14)))),
        ("IQ3_XXS", {}, Kind.K, ["IQ2_S"] * 16),
        ("IQ2_M", {}, Kind.DOWN, per_layer("IQ2_S", "IQ3_S", {0, 1})),
        ("IQ2_M", {}, Kind.HEAD, ["Q5_K"]),
        ("IQ2_M", {}, Kind.EMBEDDING, ["IQ3_S"]),
        ("IQ2_S", {}, Kind.UP, ["IQ2_XS"] * 16),
        ("IQ2_XXS", {}, Kind.ATTENTION_OUTPUT, ["IQ2_XXS"] * 16),
        ("IQ1_S", {}, Kind.ATTENTION_OUTPUT, ["IQ2_XXS"] * 16),
        ("IQ1_S", {}, Kind.EMBEDDING, ["Q2_K"]),
        ("TQ2_0", {}, Kind.EMBEDDING, ["Q4_K"]),
        ("F16", {}, Kind.HEAD, ["F16"]),
    ],
)
def test_what_a_mix_gives(
    mix: str, changes: dict[str, Any], kind: Kind, expected: list[str]
) -> None:
    assert types(mix, decoder(**changes))[kind] == expected


def test_some_mixes_ask_for_an_importance_matrix_first() -> None:
    plain = {mix: types(mix, decoder(), weighted=False)[Kind.DOWN] for mix in MIXES}
    weighted = {mix: types(mix, decoder())[Kind.DOWN] for mix in MIXES}
    differing = {mix for mix in MIXES if plain[mix] != weighted[mix]}
    assert differing == {"Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "IQ3_XXS"}
    assert plain["IQ4_NL"] == per_layer("IQ4_NL", "Q5_K", {0, 1})
    assert plain["IQ3_XXS"] == per_layer("Q3_K", "Q4_K", {0, 1})


def test_fused_weights_follow_the_rules_of_values_and_up() -> None:
    fused = decoder(model_type="phi3", pad_token_id=0, num_key_value_heads=8)
    assert types("Q4_K_M", fused)[Kind.QKV] == per_layer("Q4_K", "Q6_K", MORE)
    middle = per_layer("IQ3_S", "IQ3_XXS", set(range(2, 14)))
    assert types("IQ3_XS", fused)[Kind.GATE_UP] == middle


@pytest.mark.parametrize(
    ("mix", "columns", "linear", "table"),
    [
        ("Q4_K_S", 576, "Q5_0", "Q8_0"),
        ("Q2_K", 576, "Q4_0", "Q8_0"),
        ("Q5_K_S", 576, "Q5_1", "Q8_0"),
        ("Q6_K", 576, "Q8_0", "Q8_0"),
        ("IQ2_XS", 576, "IQ4_NL", "Q8_0"),
        ("Q4_0", 576, "Q4_0", "Q8_0"),  # Q6_K is wanted, and falls back
        ("TQ2_0", 576, "Q4_0", "Q8_0"),
    ],
)
def test_rows_that_do_not_divide_fall_back(mix: str, columns: int, linear: str, table: str) -> None:
    plan = make_plan(
        decoder(hidden_size=columns, num_attention_heads=9, num_key_value_heads=3), mix
    )
    by_name = {c.weight.name: c.grid.name for c in plan.choices if c.grid}
    assert by_name["model.layers.5.self_attn.q_proj.weight"] == linear
    assert by_name["lm_head.weight"] == table
    reasons = {name: reason for reason, names in plan.fallbacks.items() for name in names}
    reason = reasons.get("model.layers.5.self_attn.q_proj.weight", "")
    assert (f"{linear} instead of" in reason and "576" in reason) == (linear != mix)
    assert f"{table} instead of" in reasons["lm_head.weight"]
    assert "model.layers.5.mlp.down_proj.weight" not in reasons  # its rows are of 1024


@pytest.mark.parametrize(
    ("family", "heads", "mix", "expected"),
    [
        ("llama", 4, "Q4_K_M", {"Q5_K", "Q6_K"}),
        ("llama", 4, "Q3_K_S", {"Q5_K"}),
        ("llama", 4, "Q4_K_S", {"Q5_K"}),
        ("llama", 8, "Q4_K_M", {"Q4_K", "Q6_K"}),  # 65B
        ("qwen2", 8, "Q4_K_M", {"Q5_K", "Q6_K"}),
        ("mistral", 4, "Q3_K_S", {"Q5_K"}),
        ("qwen3", 4, "Q3_K_S", {"Q3_K"}),
        ("llama", 4, "IQ2_XS", {"Q2_K"}),
    ],
)
def test_values_of_80_layers(family: str, heads: int, mix: str, expected: set[str]) -> None:
    more: dict[str, Any] = {"head_dim": 64} if family == "qwen3" else {}
    config = decoder(model_type=family, num_hidden_layers=80, num_key_value_heads=heads, **more)
    assert set(types(mix, config)[Kind.V]) == expected


def test_rows_that_divide_into_nothing_stay_float16() -> None:
    config = decoder(intermediate_size=1000)
    choice = make_plan(config, "Q4_K_M")["model.layers.0.mlp.down_proj.weight"]
    assert choice.grid is None and "F16 instead of" in choice.reason


def test_methods_of_a_mix() -> None:
    config = decoder()
    methods = {c.weight.name: c.method for c in make_plan(config, "IQ2_M", "gptq").choices}
    assert methods["model.layers.0.mlp.up_proj.weight"] == "imatrix"  # IQ2_S has no single codes
    assert methods["lm_head.weight"] == methods["model.embed_tokens.weight"] == "rtn"
    assert {c.method for c in make_plan(config, "Q4_K_M", "gptq").choices if c.grid} == {
        "gptq",
        "rtn",
    }
    assert {c.method for c in make_plan(config, "Q4_K_M", "rtn").choices if c.grid} == {"rtn"}
    assert make_plan(config, "F16").quantized == ()


@pytest.mark.parametrize(
    ("preset", "method", "patterns", "why"),
    [
        ("IQ2_XS", "rtn", {}, "cannot be rounded without an importance matrix"),
        ("Q4_K_M", "gptq", {"lm_head.weight": "IQ2_XXS"}, "IQ2_XXS cannot be rounded"),
        ("Q4_K_M", "rtn-absmax", {}, "does not take rtn without its search"),
        ("int4", "imatrix", {}, "int4-g32 does not take method imatrix"),
        ("Q4_K", "gptq", {}, "preset 'Q4_K' is not known"),
        ("int4", "gptq", {"*": "Q4_Z"}, "grid 'Q4_Z'"),
    ],
)
def test_what_cannot_be_is_refused(
    preset: str, method: str, patterns: dict[str, str], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        make_plan(decoder(), preset, method, patterns)


def test_patterns_take_ggml_types() -> None:
    plan = make_plan(decoder(), "int4", "gptq", {"*.down_proj.weight": "Q6_K"})
    choice = plan["model.layers.3.mlp.down_proj.weight"]
    assert choice.grid is not None
    assert (choice.grid.name, choice.method) == ("Q6_K", "gptq")
    assert type(plan).from_json(plan.to_json(), decoder()) == plan
