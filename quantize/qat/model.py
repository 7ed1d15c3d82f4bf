"""A decoder whose weights are modules: the teacher as it is, the student as it would ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...decoder import (
    LayerWeights,
    Parameters,
    Tables,
    attention_tables,
    decoder_layer,
    embed,
    head,
)

MakeWeight = Callable[[Weight], nn.Module]


class Plain(nn.Module):
    """A weight as it is; a parameter, so that it is sharded as others are."""

    def __init__(self, values: Tensor, trained: bool = False) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=trained)

    def forward(self) -> Tensor:
        return self.values


class Output(NamedTuple):
    """What a decoder gives for ids (windows, length).

    Attributes:
        logits: (windows, length, vocab_size).
        hidden: of every layer, (windows, length, hidden_size) each; none if it was not asked for.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]


class Decoder(nn.Module):
    """The whole decoder; `make` gives the module that makes each weight in its forward pass.

    Args:
        recomputed: whether the backward pass computes each layer again: memory for time.
    """

    def __init__(self, config: DecoderConfig, make: MakeWeight, recomputed: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recomputed = recomputed
        found: dict[int | None, list[Weight]] = {}
        for weight in weights(config):
            found.setdefault(weight.layer, []).append(weight)
        self.top = _Part(found.pop(None), make)
        self.layers = nn.ModuleList(_Layer(config, part, make) for part in found.values())
        self._tables: dict[int, list[Tables]] = {}

    def forward(self, ids: Tensor, hidden: bool = False) -> Output:
        """Logits, and with `hidden` the output of every layer, of int64 ids (windows, length)."""
        config, top = self.config, self.top.weights()
        states = embed(ids, top[Kind.EMBEDDING].weight, config)
        kept = []
        for layer, tables in zip(self.layers, self._tables_of(ids), strict=True):
            if self.recomputed and torch.is_grad_enabled():
                states = checkpoint(layer, states, tables, use_reentrant=False)
            else:
                states = layer(states, tables)
            if hidden:
                kept.append(states)
        table = top[Kind.EMBEDDING if config.tied else Kind.HEAD].weight
        return Output(head(states, top[Kind.FINAL_NORM].weight, table, config), tuple(kept))

    def made_by(self) -> Mapping[str, nn.Module]:
        """{source name of a weight: the module that makes it}."""
        return {name: module for part in (self.top, *self.layers) for name, module in part.named()}

    def _tables_of(self, ids: Tensor) -> list[Tables]:
        """Kept by length: a training run has one or two."""
        length = ids.shape[-1]
        if length not in self._tables:
            self._tables[length] = [
                Tables(*(None if part is None else part.to(ids.device) for part in tables))
                for tables in attention_tables(self.config, length)
            ]
        return self._tables[length]


class _Part(nn.Module):
    """The weights of one layer, or of those outside the layers."""

    def __init__(self, held: list[Weight], make: MakeWeight) -> None:
        super().__init__()
        self._held = {self._key(weight): weight for weight in held}
        self.made = nn.ModuleDict({key: make(weight) for key, weight in self._held.items()})

    @staticmethod
    def _key(weight: Weight) -> str:
        """A module's name has no dots."""
        return f"{weight.kind.name}_{weight.name.rpartition('.')[2]}".lower()

    def named(self) -> list[tuple[str, nn.Module]]:
        return [(self._held[key].name, module) for key, module in self.made.items()]

    def weights(self) -> LayerWeights:
        found: dict[Kind, dict[str, Tensor]] = {}
        for key, module in self.made.items():
            weight = self._held[key]
            found.setdefault(weight.kind, {})[weight.name.rpartition(".")[2]] = module()
        return {kind: Parameters(**fields) for kind, fields in found.items()}


class _Layer(_Part):
    def __init__(self, config: DecoderConfig, held: list[Weight], make: MakeWeight) -> None:
        super().__init__(held, make)
        self.config = config

    def forward(self, states: Tensor, tables: Tables) -> Tensor:
        return decoder_layer(states, self.weights(), self.config, tables)
