"""Merging against peft's own forward pass, for every kind of adapter that is supported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from slimport.adapters.lora import Adapter, read_adapter
from slimport.adapters.merge import Merged, merged_config
from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

MakeModel = Callable[..., Path]
TOKENS = torch.randint(0, 400, (1, 16), generator=torch.Generator().manual_seed(5))
ATTENTION = ["q_proj", "v_proj"]
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Path, folder: Path, seed: int = 1, **lora: object) -> Path:
    """A peft adapter with every trainable tensor moved, so that no half of it is zero."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **lora})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return folder


def read(base: Path, folder: Path) -> tuple[Checkpoint, Adapter]:
    checkpoint = Checkpoint.open(base)
    return checkpoint, read_adapter(folder, "a", checkpoint, decoder_config(checkpoint.config))


def peft_logits(base: Path, folder: Path, scale: float = 1.0) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: scale * value for name, value in module.scaling.items()}
    with torch.no_grad():
        return model.double()(TOKENS).logits  # so that only the rounding of the merge is left


def merged_logits(checkpoint: Checkpoint, merged: Merged, folder: Path) -> torch.Tensor:
    folder.mkdir()
    config = merged_config(checkpoint.config, merged.adapter)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    state = {name: torch.from_numpy(merged.rows(name).copy()) for name in merged.names()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model.double()(TOKENS).logits


# kind -> family, tied base, whether the merge unties, LoraConfig
KINDS = {
    "attention": ("llama", True, False, {"target_modules": ATTENTION}),
    "every linear": ("llama", True, False, {"target_modules": EVERY_LINEAR}),
    "qwen2": ("qwen2", True, False, {"target_modules": EVERY_LINEAR}),
    "qwen3": ("qwen3", False, False, {"target_modules": EVERY_LINEAR}),
    "regex": ("llama", True, False, {"target_modules": r".*layers\.1\..*\.(q|up)_proj"}),
    "all-linear": ("llama", True, False, {"target_modules": "all-linear"}),
    "layers": ("llama", True, False, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "rslora": ("llama", True, False, {"target_modules": EVERY_LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        True,
        False,
        {
            "target_modules": EVERY_LINEAR,
            "rank_pattern": {"q_proj": 2, r"^model\.layers\.0\.mlp\.\w+": 8, "roj": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, r".*\.(o|up)_proj": 1.5},
        },
    ),
    "patterns rslora": (
        "llama",
        True,
        False,
        {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 9}, "use_rslora": True},
    ),
    "dora": ("llama", True, False, {"target_modules": EVERY_LINEAR, "use_dora": True}),
    "dora qwen2": ("qwen2", True, False, {"target_modules": EVERY_LINEAR, "use_dora": True}),
    "dora embedding": (
        "llama",
        False,
        False,
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "dora tied embedding": (
        "llama",
        True,
        True,
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
    "tables untied": (
        "llama",
        False,
        False,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "embedding tied": ("llama", True, True, {"target_modules": ["q_proj", "embed_tokens"]}),
    "head tied": ("llama", True, True, {"target_modules": ["q_proj", "lm_head"]}),
    "tables tied": (
        "llama",
        True,
        True,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "embedding kept tied": (
        "llama",
        True,
        False,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "dora kept tied": (
        "llama",
        True,
        True,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
    ),
    "save norms": (
        "llama",
        True,
        False,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    ),
    "save linear with bias": (
        "qwen2",
        True,
        False,
        {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
    ),
    "save head tied": (
        "llama",
        True,
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "save embedding tied": (
        "llama",
        True,
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "save tables tied": (
        "llama",
        True,
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "save tables kept tied": (
        "llama",
        True,
        False,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "save tables untied": (
        "llama",
        False,
        False,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tokens tied": (
        "llama",
        True,
        False,
        {"target_modules": ["q_proj"], "trainable_token_indices": [399, 0, 17]},
    ),
    "tokens untied": (
        "llama",
        False,
        False,
        {"target_modules": ["q_proj"], "trainable_token_indices": [399, 0, 17]},
    ),
    "tokens differ": (
        "llama",
        True,
        True,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [1]},
        },
    ),
    "tokens of both": (
        "llama",
        True,
        False,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]},
        },
    ),
    "biases all": ("qwen2", True, False, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases lora_only": ("qwen2", True, False, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", True, False, {"target_modules": ATTENTION, "lora_bias": True}),
    "fan_in_fan_out": (
        "llama",
        True,
        False,
        {"target_modules": EVERY_LINEAR, "fan_in_fan_out": True},
    ),
    "mica": ("llama", True, False, {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_peft_computes(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    family, tied, unties, lora = KINDS[kind]
    base = make_model(family, tie_word_embeddings=tied)
    folder = save_adapter(base, tmp_path / "lora", **lora)
    checkpoint, adapter = read(base, folder)
    merged = Merged(checkpoint, adapter)
    assert adapter.unties == unties
    assert merged.tied == (tied and not unties)
    expected = peft_logits(base, folder)
    found = merged_logits(checkpoint, merged, tmp_path / "merged")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["patterns rslora", "dora embedding", "save tables untied"])
def test_weights_are_those_of_merge_and_unload(
    kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    family, tied, _, lora = KINDS[kind]
    base = make_model(family, tie_word_embeddings=tied)
    folder = save_adapter(base, tmp_path / "lora", **lora)
    merged = Merged(*read(base, folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    expected = model.merge_and_unload().state_dict()
    for name in merged.names():
        np.testing.assert_allclose(merged.rows(name), expected[name], rtol=0, atol=1e-6)


def test_a_block_of_rows_is_a_part_of_the_whole(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("llama", tie_word_embeddings=True)
    for lora in (
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [100, 7, 415]},
    ):
        folder = save_adapter(base, tmp_path / str(len(str(lora))), **lora)
        merged = Merged(*read(base, folder))
        for name in merged.names():
            whole = merged.rows(name)
            assert whole.shape == merged.shape(name) and whole.dtype == np.float32
            parts = [merged.rows(name, start, start + 37) for start in range(0, len(whole), 37)]
            np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "embedding tied", "lora_bias"])
def test_scale_multiplies_the_update(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    family, tied, _, lora = KINDS[kind]
    base = make_model(family, tie_word_embeddings=tied)
    folder = save_adapter(base, tmp_path / "lora", **lora)
    checkpoint, adapter = read(base, folder)
    found = merged_logits(checkpoint, Merged(checkpoint, adapter, -0.7), tmp_path / "merged")
    np.testing.assert_allclose(found, peft_logits(base, folder, -0.7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "save norms", "tokens tied"])
def test_scale_is_refused_where_nothing_is_added(
    kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    family, tied, _, lora = KINDS[kind]
    base = make_model(family, tie_word_embeddings=tied)
    checkpoint, adapter = read(base, save_adapter(base, tmp_path / "lora", **lora))
    with pytest.raises(Unsupported, match="cannot be applied"):
        Merged(checkpoint, adapter, 0.5)
    with pytest.raises(UsageError, match="not finite"):
        Merged(checkpoint, adapter, float("nan"))


def test_overflow_names_the_weight(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("llama")
    folder = save_adapter(base, tmp_path / "lora", target_modules=ATTENTION)
    checkpoint, adapter = read(base, folder)
    name = "model.layers.1.self_attn.v_proj.weight"
    large = replace(adapter.deltas[name], scale=1e38, b=adapter.deltas[name].b * 1e6)
    merged = Merged(checkpoint, replace(adapter, deltas={**adapter.deltas, name: large}))
    merged.rows("model.layers.0.self_attn.v_proj.weight")
    with pytest.raises(BadInput, match=name):
        merged.rows(name)


WHY_NOT_SEPARATE = {
    "attention": None,
    "rslora": None,
    "tables untied": None,
    "dora": "DoRA",
    "save head tied": "lm_head.weight",
    "embedding tied": "tied",
    "embedding kept tied": "tied",
    "head tied": "tied",
    "lora_bias": "bias",
    "biases all": "bias",
    "tokens tied": "rows",
}


@pytest.mark.parametrize("kind", WHY_NOT_SEPARATE)
def test_what_can_stay_separate(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    family, tied, _, lora = KINDS[kind]
    base = make_model(family, tie_word_embeddings=tied)
    _, adapter = read(base, save_adapter(base, tmp_path / "lora", **lora))
    reason = WHY_NOT_SEPARATE[kind]
    assert adapter.why_not_separate == reason or (reason or "?") in str(adapter.why_not_separate)


def test_factors_are_in_source_row_order_with_the_true_scale(
    make_model: MakeModel, tmp_path: Path
) -> None:
    base = make_model("llama", tie_word_embeddings=False)
    folder = save_adapter(
        base,
        tmp_path / "lora",
        target_modules=["k_proj", "embed_tokens"],
        rank_pattern={"k_proj": 9},
        use_rslora=True,
    )
    _, adapter = read(base, folder)
    key = adapter.deltas["model.layers.0.self_attn.k_proj.weight"]
    table = adapter.deltas["model.embed_tokens.weight"]
    assert (key.a.shape, key.b.shape, key.scale) == ((9, 64), (32, 9), 12 / 3)
    assert (table.a.shape, table.b.shape, table.scale) == ((4, 64), (416, 4), 12 / 2)
    assert (key.embedding, table.embedding, adapter.ranks) == (False, True, (4, 9))
    assert adapter.kind == "rsLoRA rank 4, 9"
