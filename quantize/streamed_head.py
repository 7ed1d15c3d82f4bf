"""The head of a decoder, some rows of its table at a time: no table and no logits are held whole.

What is summed over the vocabulary runs along with a maximum, as in a softmax that is computed
online (Milakov and Gimelshein 2018, arXiv:1805.02867); tokens are drawn by the largest of logits
plus Gumbel noise, which is drawing by their softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from ..decoder import capped, read_tensor, rms_norm

_ROWS = 8192  # of the table, at once


class StreamedHead:
    """From what the last layer gives to sums over the logits of all tokens.

    Hidden states are float32 (..., hidden_size).
    """

    def __init__(self, source: Weights, config: DecoderConfig) -> None:
        names = {weight.kind: weight.name for weight in weights(config) if weight.layer is None}
        self._source, self._config = source, config
        self._norm = read_tensor(source, names[Kind.FINAL_NORM])
        self._table = names[Kind.EMBEDDING if config.tied else Kind.HEAD]

    def gradient(self, hidden: Tensor, random: torch.Generator) -> Tensor:
        """Of the negative log-likelihood of tokens drawn by the logits, in `hidden`: its shape.

        A sum over positions: each is the gradient of its own token.
        """
        with torch.enable_grad():
            leaf = hidden.flatten(0, -2).detach().requires_grad_()
            normed = self._normed(leaf)
        inputs = normed.detach()
        total, drawn = self._draw(inputs, random)
        moved = torch.zeros_like(inputs)
        for start, rows in self._chunks():
            found = self._logits(inputs, rows)
            slope = (found - total[:, None]).exp_()
            inside = (drawn >= start) & (drawn < start + len(rows))
            places = inside.nonzero()[:, 0]
            slope[places, drawn[places] - start] -= 1
            if self._config.logits_softcap is not None:
                slope *= 1 - (found / self._config.logits_softcap).square()
            moved.addmm_(slope, rows, alpha=1 / self._config.logits_divisor)
        (gradient,) = torch.autograd.grad(normed, leaf, moved)
        return gradient.view_as(hidden)

    def divergence(self, hidden: Tensor, other: StreamedHead, moved: Tensor) -> float:
        """KL of these logits to those of `other` at hidden states `moved`: nats, summed."""
        inputs, theirs = self._normed(hidden), other._normed(moved)
        ours_sum, their_sum = _LogSum(len(inputs)), _LogSum(len(inputs))
        apart = torch.zeros(len(inputs), dtype=torch.float64)  # differences, weighed by exponents
        for (_, rows), (_, changed) in zip(self._chunks(), other._chunks(), strict=True):
            expected = self._logits(inputs, rows).double()
            found = self._logits(theirs, changed).double()
            shrunk, exponents = ours_sum.add(expected)
            apart = apart * shrunk + (exponents * (expected - found)).sum(-1)
            their_sum.add(found)
        each = apart / ours_sum.sum - ours_sum.total() + their_sum.total()
        return float(each.clamp_min(0).sum())

    def _normed(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden.flatten(0, -2), self._norm, self._config)

    def _draw(self, inputs: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Log of the sum of exponents, and a token drawn by them, for each row of `inputs`."""
        sums = _LogSum(len(inputs))
        best = torch.full((len(inputs),), -torch.inf)
        drawn = torch.zeros(len(inputs), dtype=torch.int64)
        for start, rows in self._chunks():
            found = self._logits(inputs, rows)
            sums.add(found.double())
            noise = torch.empty_like(found).exponential_(generator=random).log_().neg_()
            highest, place = (found + noise).max(-1)
            better = highest > best
            best = torch.where(better, highest, best)
            drawn = torch.where(better, place + start, drawn)
        return sums.total().float(), drawn

    def _logits(self, inputs: Tensor, rows: Tensor) -> Tensor:
        return capped(inputs @ rows.T / self._config.logits_divisor, self._config.logits_softcap)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self._config.vocab_size, _ROWS):
            stop = min(start + _ROWS, self._config.vocab_size)
            rows = np.require(self._source.rows(self._table, start, stop), np.float32, ["C", "W"])
            yield start, torch.from_numpy(rows)


class _LogSum:
    """The log of a sum of exponents that comes in parts; `sum` is over exp(it - the maximum)."""

    def __init__(self, count: int) -> None:
        self._peak = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.sum = torch.zeros(count, dtype=torch.float64)

    def add(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """By what earlier sums shrink (rows,), and exponents of `found` (rows, part)."""
        peak = torch.maximum(self._peak, found.amax(-1))
        shrunk = (self._peak - peak).exp()
        exponents = (found - peak[:, None]).exp()
        self.sum = self.sum * shrunk + exponents.sum(-1)
        self._peak = peak
        return shrunk, exponents

    def total(self) -> Tensor:
        return self._peak + self.sum.log()
