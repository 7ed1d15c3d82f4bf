"""Tiny models in the formats of other quantizers, written by hand from their published layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def words(numbers: Ints, bits: int) -> Ints:
    """Words of 32 bits along the first axis, low bits first, one at a time."""
    each = 32 // bits
    packed = np.zeros((numbers.shape[0] // each, *numbers.shape[1:]), np.int64)
    for place in range(each):
        packed |= numbers[place::each] << (bits * place)
    return packed


def int32(packed: Ints) -> torch.Tensor:
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


@dataclass(frozen=True)
class Codes:
    """(q - z) * scale of one weight: q (rows, columns), z and scale (rows, groups)."""

    q: Ints
    z: Ints
    scale: Floats

    def values(self) -> Floats:
        size = self.q.shape[1] // self.z.shape[1]
        zero, scale = (np.repeat(each, size, axis=1) for each in (self.z, self.scale))
        return ((self.q - zero) * scale.astype(np.float64)).astype(np.float32)

    def gptq(self, bits: int = 4, stored: int = -1) -> dict[str, torch.Tensor]:
        """`stored`: what is added to zero points."""
        group = self.q.shape[1] // self.z.shape[1]
        return {
            "qweight": int32(words(self.q.T, bits)),
            "qzeros": int32(words(self.z + stored, bits).T.copy()),
            "scales": torch.from_numpy(self.scale.T.copy()).half(),
            "g_idx": torch.arange(self.q.shape[1], dtype=torch.int32) // group,
        }

    def awq(self) -> dict[str, torch.Tensor]:
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def packed(numbers: Ints) -> torch.Tensor:  # (outputs, n) to (n, outputs / 8)
            return int32(
                words(
                    numbers.reshape(-1, 8, numbers.shape[1])[:, order].reshape(numbers.shape), 4
                ).T.copy()
            )

        scales = torch.from_numpy(self.scale.T.copy()).half()
        return {"qweight": packed(self.q), "qzeros": packed(self.z), "scales": scales}


def rounded(weight: torch.Tensor, group: int, bits: int = 4, symmetric: bool = False) -> Codes:
    """Round to nearest with scales of float16, as a quantizer would do it."""
    values = weight.float().numpy().astype(np.float64)
    rows, columns = values.shape
    groups, top = values.reshape(rows, columns // group, group), 2**bits - 1
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).astype(np.float16).astype(np.float32)
    zero = np.rint(-low / scale).clip(1, top)
    if symmetric:
        zero[:] = (top + 1) // 2
    q = (np.rint(groups / scale[:, :, None]) + zero[:, :, None]).clip(0, top)
    return Codes(q.reshape(rows, columns).astype(np.int64), zero.astype(np.int64), scale)


Form = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor] | None]


def rewrite(source: Path, target: Path, form: Form, config: dict[str, Any]) -> Path:
    """A copy of a model whose tensors are those of `form`, where it gives some."""
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        given = form(name, tensor) if "_proj" in name and tensor.ndim == 2 else None
        stem = name.removesuffix(".weight")
        tensors |= {name: tensor} if given is None else {f"{stem}.{k}": v for k, v in given.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    stated = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stated | config))
    return target


@pytest.fixture(scope="session")
def rewritten() -> Callable[..., Path]:
    """rewritten(source, target, form, config) -> folder; form(name, tensor) -> tensors by suffix,
    or None to leave one as it is.
    """
    return rewrite


@pytest.fixture(scope="session")
def round_to() -> Callable[..., Codes]:
    """round_to(weight, group, bits=4, symmetric=False) -> Codes."""
    return rounded
