"""Models with codes in memory, so that these tests need no quantizer and no quantized folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from slimport.architectures import DecoderConfig, decoder_config
from slimport.quantize.grid import Float32, Grid, round_scale
from slimport.quantize.plan import Plan, make_plan
from slimport.quantize.store import Record
from slimport.quantize.tensor import QuantizedTensor


@dataclass(frozen=True)
class Model:
    """Stands in for a QuantizedCheckpoint."""

    name: str
    decoder: DecoderConfig
    plan: Plan
    tensors: Mapping[str, QuantizedTensor | Float32]

    def load(self, name: str) -> QuantizedTensor | Float32:
        return self.tensors[name]

    def rows(self, name: str) -> Float32:
        tensor = self.tensors[name]
        return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor

    @property
    def records(self) -> dict[str, Record]:
        return {
            name: Record(tensor.digest(name))
            for name, tensor in self.tensors.items()
            if isinstance(tensor, QuantizedTensor)
        }

    @property
    def grids(self) -> dict[str, str]:
        return {c.weight.name: c.grid.name for c in self.plan.choices if c.grid}


def nearest(weight: Float32, grid: Grid) -> QuantizedTensor:
    """Round to nearest with the scale of the largest magnitude."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, grid.groups(columns), -1)
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
