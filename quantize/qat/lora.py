"""LoRA recovery: codes stay as they are, and an adapter beside them learns what they lost.

Low-rank matrices (Hu et al. 2021, arXiv:2106.09685) over frozen codes, as in QLoRA (Dettmers et al.
2023, arXiv:2305.14314), but distilled from the base's own full precision.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from ..grid import Float32


class Recovered(nn.Module):
    """A frozen matrix (rows, columns) and a product of rank r that is added to it.

    Parameters a (r, columns), random, and b (rows, r), zero at the start.
    """

    def __init__(self, values: Tensor, rank: int, name: str, seed: int) -> None:
        super().__init__()
        rows, columns = values.shape
        self.values = nn.Parameter(values, requires_grad=False)
        self.a = nn.Parameter(torch.from_numpy(_start(name, seed, (rank, columns))))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self) -> Tensor:
        return self.values + self.b @ self.a


def _start(name: str, seed: int, shape: tuple[int, int]) -> Float32:
    """Uniform, of the size that peft gives it; the same for a weight whatever else trains."""
    words = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(words, np.uint32))
    bound = 1 / math.sqrt(shape[1])
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def write_adapter(made: Mapping[str, nn.Module], rank: int, base: str, folder: Path) -> None:
    """Write a PEFT folder: peft's names, one scale for all (alpha = rank).

    Args:
        made: {source name of a weight: its module}; those that are `Recovered` are written.
        base: the model's name.
    """
    folder.mkdir()
    tensors: dict[str, Float32] = {}
    for name, module in made.items():
        if isinstance(module, Recovered):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = module.a.detach().numpy()
            tensors[f"{stem}.lora_B.weight"] = module.b.detach().numpy()
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
