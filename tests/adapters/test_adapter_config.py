"""Rules about module names, held to peft's own functions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from slimport.adapters.config import AdapterConfig, read_config

MODULES = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1, 10, 11) for name in "qkvo"),
    *(
        f"model.layers.{i}.mlp.{name}_proj"
        for i in (0, 1, 10, 11)
        for name in ("gate", "up", "down")
    ),
    "model.embed_tokens",
    "lm_head",
]
PATTERNS = [
    {"q_proj": 2},
    {"layers.1.self_attn.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "layers.1.self_attn.q_proj": 2},
    {"model.layers.1.self_attn.q_proj": 2},
    {r"^model\.layers\.0\.mlp\.\w+": 5, "roj": 7},
    {r"layers\.\d+\.self_attn\.(q|v)_proj": 6},
    {"proj": 2, ".*proj": 3},
    {r"1\..*": 9},
    {"q_proj|k_proj": 4},
    {"lm_head": 16, "embed_tokens": 1},
]
TARGETS = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
]


def read(folder: Path, **keys: Any) -> AdapterConfig:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | keys))
    return read_config(folder)


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_match_as_in_peft(patterns: dict[str, int], tmp_path: Path) -> None:
    config = read(tmp_path, r=4, lora_alpha=5, rank_pattern=patterns, alpha_pattern=patterns)
    matched = 0
    for module in MODULES:
        found = get_pattern_key(patterns.keys(), module)
        rank, alpha = patterns.get(found, 4), patterns.get(found, 5)
        assert (config.rank_of(module), config.scale_of(module)) == (rank, alpha / rank)
        matched += found in patterns
    assert matched


@pytest.mark.parametrize("keys", TARGETS, ids=str)
def test_targets_match_as_in_peft(keys: dict[str, Any], tmp_path: Path) -> None:
    config, peft = read(tmp_path, **keys), LoraConfig(**keys)
    for module in MODULES:
        expected = check_target_module_exists(peft, module)
        excluded = type(expected).__name__ == "_ExcludedModule"
        assert config.targets(module) == (bool(expected) and not excluded), module


def test_rslora_divides_by_the_root(tmp_path: Path) -> None:
    config = read(tmp_path, r=5, lora_alpha=7, use_rslora=True, rank_pattern={"q_proj": 9})
    assert config.scale_of("x.q_proj") == 7 / 3
    assert config.scale_of("x.k_proj") == 7 / math.sqrt(5)


def test_missing_keys_are_those_of_peft(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.rank, config.alpha) == (LoraConfig().r, LoraConfig().lora_alpha)
