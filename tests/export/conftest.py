"""Models with codes in memory, so that these tests need no quantizer and no quantized folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from slimport.adapters.adapter import Adapter
from slimport.adapters.lora import read_adapter
from slimport.architectures import DecoderConfig, decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export.container import Base, Deployment
from slimport.quantize.grid import Float32, Grid, round_scale
from slimport.quantize.plan import Plan, make_plan
from slimport.quantize.store import Record, float_digest
from slimport.quantize.tensor import QuantizedTensor, weights_digest

LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32, "attention_bias": True}),
    "llama-untied-mha": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2-linear-untied": ("qwen2", {"rope_parameters": LINEAR, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7}),
    "gemma3-every-third": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "phi3": ("phi3", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),  # longer texts only outside of GGUF
    "phi3-window": ("phi3", {"sliding_window": 24}),
    "phi3-long": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,  # llama.cpp's shortest context
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            },
        },
    ),
}


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "every linear": ("llama", {}, {"target_modules": EVERY, "r": 8, "lora_alpha": 12}),
    "rslora": ("llama", {}, {"target_modules": ATTENTION, "r": 6, "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": EVERY,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 10, "down_proj": 2},
            "alpha_pattern": {"q_proj": 5, "v_proj": 16},
        },
    ),
    "qwen3": ("qwen3", {}, {"target_modules": EVERY, "r": 4}),
    "tables": (
        "llama",
        {"tie_word_embeddings": False},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4, "lora_alpha": 16},
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `variant` runs once for each (family, config); one that takes `adapted`
    once for each (family, config, settings of a LoRA).
    """
    for name, values in (("variant", VARIANTS), ("adapted", ADAPTERS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values.values(), ids=values)


@pytest.fixture
def llama3() -> dict[str, Any]:
    """Rope parameters of Llama 3.1."""
    return LLAMA3


@dataclass(frozen=True)
class Model:
    """Stands in for a QuantizedCheckpoint."""

    name: str
    decoder: DecoderConfig
    plan: Plan
    tensors: Mapping[str, QuantizedTensor | Float32]

    def load(self, name: str) -> QuantizedTensor | Float32:
        return self.tensors[name]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        tensor = self.tensors[name]
        values = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        return values[start:stop]

    @cached_property
    def records(self) -> dict[str, Record]:
        return {
            name: Record(
                tensor.digest(name)
                if isinstance(tensor, QuantizedTensor)
                else float_digest(name, tensor)
            )
            for name, tensor in self.tensors.items()
        }

    @property
    def weights_digest(self) -> str:
        return weights_digest({name: self.records[name].digest for name in self.grids})

    def base(self, digest: str | None = None, **fields: Any) -> Base:
        """What adapters are made for; `fields` are those of Base that a container reads."""
        given: dict[str, Any] = {"tokenizer": None, "deployment": Deployment(64), **fields}
        base = Base.of(self, **given)  # type: ignore[arg-type]
        return dataclasses.replace(base, weights_digest=digest) if digest else base

    @property
    def grids(self) -> dict[str, str]:
        return {c.weight.name: c.grid.name for c in self.plan.choices if c.grid}


def nearest(weight: Float32, grid: Grid) -> QuantizedTensor:
    """Round to nearest with the scale of the largest magnitude."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, grid.groups(columns), -1)
    if grid.asymmetric:
        low, high = grouped.min(-1, initial=0), grouped.max(-1, initial=0)
        scale = round_scale((high - low) / 15)
        zero = np.clip(np.rint(-low / scale), 0, 15)[..., None]
        codes = np.clip(np.rint(grouped / scale[..., None]), -zero, 15 - zero)
    else:
        scale = round_scale(np.abs(grouped).max(-1) / grid.high)
        codes = np.clip(np.rint(grouped / scale[..., None]), grid.low, grid.high)
    return QuantizedTensor(grid, codes.reshape(rows, columns).astype(np.int8), scale)


def model_of(folder: Path, preset: str = "int4", patterns: Mapping[str, str] = {}) -> Model:
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    plan = make_plan(config, preset, "rtn", patterns)
    stored = load_file(folder / "model.safetensors")
    tensors = {
        choice.weight.name: stored[choice.weight.name]
        if choice.grid is None
        else nearest(stored[choice.weight.name], choice.grid)
        for choice in plan.choices
    }
    return Model(folder.name, config, plan, tensors)


@pytest.fixture(scope="session")
def in_memory() -> Callable[..., Model]:
    """in_memory(folder, preset="int4", patterns={}) -> Model."""
    return model_of


def train(folder: Path, target: Path, settings: dict[str, Any]) -> Any:
    """A peft model with random factors of a size that shows, saved to `target`."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(target, save_embedding_layers=False)
    return model.eval()


def read_tone_of(folder: Path, target: Path, config: Any) -> Adapter:
    return read_adapter(target, "tone", Checkpoint.open(folder), config)


@pytest.fixture(scope="session")
def train_adapter() -> Callable[..., Any]:
    """train_adapter(folder, target, settings) -> peft model."""
    return train


@pytest.fixture(scope="session")
def read_tone() -> Callable[..., Adapter]:
    """read_tone(folder, target, config) -> what `train_adapter` saved, under the name "tone"."""
    return read_tone_of


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Any]:
    """oracle(folder, tokens, tensors) -> transformers' logits in float32; scores (n, 1) of a
    reward model.

    `tensors` {source name: values or codes} stand in place of the stored weights.
    """

    def logits(folder: Path, tokens: Any, tensors: dict[str, Any]) -> Any:
        config = decoder_config(json.loads((folder / "config.json").read_text()))
        kind: Any = AutoModelForSequenceClassification if config.reward else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        values = {
            name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
            for name, tensor in tensors.items()
        }
        state = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}
        if config.tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        with torch.inference_mode():
            return model(torch.from_numpy(tokens).long()).logits.numpy()

    return logits
