"""Fake quantization on the grid that ships: differentiable, and equal to the shipped weight.

LSQ (Esser et al. 2020, arXiv:1902.08153): codes are rounded and clamped latent weights, the scale
is learned, and gradients pass both roundings straight through. The forward pass is exact: a code
times a scale of 8 significant bits is one float32 product, as in `QuantizedTensor.dequantize`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..grid import SCALE_CEILING, SCALE_FLOOR, Grid
from ..tensor import QuantizedTensor

_SMALLEST_FACTOR = 2.0**-100  # a scale never turns its sign


def round_scale(scale: Tensor) -> Tensor:
    """As `grid.round_scale`, to the bit: any shape, float32, on any device."""
    bits = scale.contiguous().view(torch.int32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).view(torch.float32)
    magnitude = rounded.abs().clamp(SCALE_FLOOR, SCALE_CEILING)
    return torch.where(scale == 0, torch.ones_like(scale), torch.copysign(magnitude, rounded))


def encode(latent: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest code of every weight, ties to even: float32 (rows, groups, group).

    Args:
        latent: float32 (rows, columns).
        scale: float32 (rows, groups), rounded.
    """
    rows, groups = scale.shape
    nearest = (latent.view(rows, groups, -1) / scale[:, :, None]).round_()
    return nearest.clamp_(grid.low, grid.high) + 0.0  # no negative zero: a code is an integer


class _RoundScale(torch.autograd.Function):
    """`round_scale` straight through."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return round_scale(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _FakeQuantize(torch.autograd.Function):
    """Latent weights and rounded scales to the weights that ship."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(latent, scale)
        ctx.grid = grid
        return (encode(latent, scale, grid) * scale[:, :, None]).view_as(latent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """LSQ's equation 3; a latent weight outside of the codes' range has no gradient."""
        latent, scale = ctx.saved_tensors
        code = encode(latent, scale, ctx.grid)
        steps = latent.view_as(code) / scale[:, :, None]
        inside = (steps >= ctx.grid.low - 0.5) & (steps <= ctx.grid.high + 0.5)
        gradient = gradients[0].reshape_as(code)
        by_scale = (gradient * torch.where(inside, code - steps, code)).sum(-1)
        return (gradient * inside).view_as(latent), by_scale, None


class FakeQuantized(nn.Module):
    """A matrix (rows, columns) that trains on a grid.

    Its parameters are near 1 in size whatever the model, so that one learning rate fits all:
    latent weights in units of a power of two near the mean scale, and factors on the first scales.

    Args:
        start: what it is before the first step: latent weights lie on their codes, so that nothing
            of what GPTQ found is lost.
    """

    first_scale: Tensor

    def __init__(self, start: QuantizedTensor) -> None:
        super().__init__()
        self.grid = start.grid
        self.unit = 2.0 ** round(math.log2(float(np.abs(start.scale).mean())))
        latent = start.dequantize() / np.float32(self.unit)
        self.latent = nn.Parameter(torch.from_numpy(latent))
        self.factor = nn.Parameter(torch.ones(start.scale.shape))
        self.register_buffer("first_scale", torch.from_numpy(start.scale.copy()))

    def scale(self) -> Tensor:
        """The rounded scales, float32 (rows, groups)."""
        wanted = self.first_scale * self.factor.clamp_min(_SMALLEST_FACTOR)
        rounded: Tensor = _RoundScale.apply(wanted)  # type: ignore[no-untyped-call]
        return rounded

    def forward(self) -> Tensor:
        """The weight as it would ship now, float32 (rows, columns)."""
        latent = self.latent * self.unit
        found: Tensor = _FakeQuantize.apply(latent, self.scale(), self.grid)  # type: ignore[no-untyped-call]
        return found

    def quantized(self) -> QuantizedTensor:
        """The weight as it would ship now, as codes and scales."""
        with torch.no_grad():
            scale = self.scale()
            codes = encode(self.latent * self.unit, scale, self.grid).flatten(1).to(torch.int8)
        return QuantizedTensor(self.grid, codes.cpu().numpy(), scale.cpu().numpy())
