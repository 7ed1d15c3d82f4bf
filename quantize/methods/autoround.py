"""Learned rounding: codes and scales of a decoder layer by gradient descent on its outputs.

After AutoRound (Cheng et al. 2023, arXiv:2309.05516): each weight has an offset that is added
before it is rounded, each scale a factor, and gradients (straight through the rounding) move both
so that the layer gives what it gives in full precision. What differs here: It starts at GPTQ's
codes and scales. Scales are rounded to what ships before codes are chosen, so that what is measured
is what is stored, bit for bit. The error of each token counts as a part of the token, for the next
norm divides by it. Steps are Adam's and not the sign of a gradient. And it keeps the best of what
it saw on windows that neither GPTQ nor the gradients have seen; if that is the start, GPTQ's codes
stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...architectures import Kind, weights
from ...decoder import LayerWeights
from ..calibration import Passage
from ..grid import Float32, Grid, round_scale
from ..tensor import QuantizedTensor

_STEPS = 200
_LOOKS = 10  # at the held windows, evenly spread over the steps
_RATE = 0.005  # Adam's in the first step, in codes; falls to zero linearly
_SCALE_RATE = 0.001  # the same, as a part of a scale
_DECAYS = 0.9, 0.99  # of Adam's means
_LEAST = 1e-20  # beside a root of squared gradients: those of large layers are small
_FACTORS = 0.5, 1.5  # of a scale
_MARGIN = 0.1  # codes: how far inside its code a weight starts that GPTQ moved


@dataclass(frozen=True, slots=True)
class Learnt:
    """How it went.

    Attributes:
        before, after: squared error of the layer's output on windows that were not learnt from,
            as a part of its square, mean over tokens: of GPTQ's codes, and of those that are kept.
        steps: after how many steps the codes that are kept were seen; 0: they are GPTQ's.
    """

    before: float
    after: float
    steps: int


def refine(
    values: Mapping[str, Float32],
    start: Mapping[str, QuantizedTensor],
    others: Mapping[str, Float32],
    passage: Passage,
) -> tuple[dict[str, QuantizedTensor], Learnt]:
    """Learn the codes and scales of some Linears of one layer together.

    Args:
        values: {name: the weight in full precision, float32 (rows, columns)}.
        start: GPTQ's codes and scales of the same, on grids without levels.
        others: dequantized weights of the Linears that are on grids too and stay as they are.
    """
    linears = {name: _Linear(values[name], tensor) for name, tensor in start.items()}
    known = {**values, **others}  # in place of reading them again
    layer = passage.load({name: torch.from_numpy(array) for name, array in known.items()})
    kinds = {
        weight.name: weight.kind for weight in weights(passage.config) if weight.name in linears
    }
    kept = dict(start)
    before = best = _judged(layer, kinds, linears, passage)
    steps = 0
    rng = np.random.default_rng(passage.index)
    waiting: list[int] = []
    moving = torch.optim.Adam(
        [
            {"params": [linear.offset for linear in linears.values()], "lr": _RATE},
            {"params": [linear.factor for linear in linears.values()], "lr": _SCALE_RATE},
        ],
        betas=_DECAYS,
        eps=_LEAST,
    )
    slower = torch.optim.lr_scheduler.LinearLR(moving, 1.0, 0.0, _STEPS)
    for step in range(1, _STEPS + 1):
        waiting = waiting or rng.permutation(passage.teaches).tolist()
        batch = waiting.pop()
        output = _output(layer, kinds, linears, passage, batch)
        _missed(output, passage.targets(batch)).mean().backward()  # type: ignore[no-untyped-call]
        for linear in linears.values():
            linear.hold_zeros()
        moving.step()
        moving.zero_grad()
        slower.step()
        if step % (_STEPS // _LOOKS):
            continue
        found = _judged(layer, kinds, linears, passage)
        if found < best:
            best, steps = found, step
            kept = {name: linear.tensor() for name, linear in linears.items()}
    return kept, Learnt(before, best, steps)


def _judged(
    layer: LayerWeights,
    kinds: Mapping[str, Kind],
    linears: Mapping[str, _Linear],
    passage: Passage,
) -> float:
    """The mean of `_missed` on the windows to measure on."""
    with torch.no_grad():
        missed = [
            _missed(_output(layer, kinds, linears, passage, batch), passage.targets(batch))
            for batch in passage.judges
        ]
    return torch.cat(missed).mean(dtype=torch.float64).item()


def _output(
    layer: LayerWeights,
    kinds: Mapping[str, Kind],
    linears: Mapping[str, _Linear],
    passage: Passage,
    batch: int,
) -> Tensor:
    now = {kinds[name]: linear.values() for name, linear in linears.items()}
    moved = {kind: layer[kind]._replace(weight=weight) for kind, weight in now.items()}
    return passage.run(passage.inputs(batch), {**layer, **moved})


def _missed(output: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of each token, as a part of its square: (tokens,)."""
    missed, whole = ((x.square().sum(-1)).flatten() for x in (output - wanted, wanted))
    return missed / whole.clamp_min(torch.finfo().tiny)


class _Linear:
    """A weight that is learnt, in groups (rows, groups, size).

    Attributes:
        offset: in codes, of each weight; learnt.
        factor: (rows, groups), of each scale; learnt, within _FACTORS.
    """

    def __init__(self, values: Float32, start: QuantizedTensor) -> None:
        self._grid = start.grid
        self._shape = start.shape
        groups = (*start.scale.shape, -1)
        self._weight = torch.from_numpy(np.ascontiguousarray(values)).view(groups)
        self._scale = torch.from_numpy(start.scale)
        self._moves = self._weight.ne(0).any(-1)
        self.offset = self._first_offset(torch.from_numpy(start.codes).view(groups))
        self.offset.requires_grad_()
        self.factor = torch.ones_like(self._scale).requires_grad_()

    def _first_offset(self, codes: Tensor) -> Tensor:
        """The smallest offsets that give these codes, with a margin."""
        plain = self._weight / self._scale[..., None]
        wanted = plain.clamp(codes - (0.5 - _MARGIN), codes + (0.5 - _MARGIN))
        low, high = self._grid.low, self._grid.high
        clipped = ((codes == low) & (plain < low)) | ((codes == high) & (plain > high))
        return torch.where(clipped, 0.0, wanted - plain)

    def values(self) -> Tensor:
        """The codes' values (rows, columns), as they would ship; differentiable."""
        found: Tensor = _FakeQuantized.apply(
            self._weight, self._scale, self.offset, self.factor, self._grid
        )  # type: ignore[no-untyped-call]
        return found.view(self._shape)

    def tensor(self) -> QuantizedTensor:
        """What ships."""
        with torch.no_grad():
            scale = _rounded(self._scale, self.factor)
            codes, _ = _codes(self._weight, scale, self.offset, self._grid)
        return QuantizedTensor(
            self._grid, codes.to(torch.int8).view(self._shape).numpy(), scale.numpy()
        )

    def hold_zeros(self) -> None:
        """Take the gradients of all-zero groups away: their scale means nothing."""
        assert self.offset.grad is not None and self.factor.grad is not None
        self.offset.grad.mul_(self._moves[..., None])
        self.factor.grad.mul_(self._moves)


def _rounded(scale: Tensor, factor: Tensor) -> Tensor:
    return torch.from_numpy(round_scale((scale * factor.clamp(*_FACTORS)).numpy()))


def _codes(weight: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes as float32, and whether each is inside of the grid without being clipped."""
    nearest = (weight / scale[..., None] + offset).round_()
    codes = nearest.clamp(grid.low, grid.high)
    return codes, codes == nearest


class _FakeQuantized(torch.autograd.Function):
    """Values of codes; backward as if they were not rounded, and clipped ones were constant."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor, factor: Tensor, grid: Grid
    ) -> Tensor:
        rounded = _rounded(scale, factor)
        codes, inside = _codes(weight, rounded, offset, grid)
        ctx.save_for_backward(weight, scale, rounded, codes.to(torch.int8), inside)
        return codes.mul_(rounded[..., None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale, rounded, codes, inside = ctx.saved_tensors
        offset = gradient * inside * rounded[..., None]
        # value = scale * (weight / scale + offset) where it is inside: the weight's part is fixed
        slope = codes - weight / rounded[..., None] * inside
        factor = (gradient * slope).sum(-1) * scale
        return None, None, offset, factor, None
