"""One decoder layer at a time: its Linears solved one by one, learnt together, or by what is best.

No method wins everywhere, least of all at 2 bits. Method auto solves a layer by each of those that
its grids take, runs the rest of the model in full precision on what it then gives, and keeps the
method whose logits lie nearest to those of the whole model in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..architectures import DecoderConfig, Kind, weights
from ..checkpoint import Weights
from ..decoder import decoder_layer, head, load_layer, read_tensor
from ..errors import UsageError
from .blocks import Quantized
from .calibration import Passage, Statistics
from .grid import Float32
from .methods import autoround
from .plan import CANDIDATES, Choice, method_of
from .tensor import QuantizedTensor

Solve = Callable[[Float32, Choice, Statistics], Quantized]
_TOKENS_AT_ONCE = 256  # whose logits are compared at once


@dataclass(frozen=True, slots=True)
class Solved:
    """A quantized layer.

    Attributes:
        tensors: by weight name.
        told: what was measured, for the record; empty where nothing was.
    """

    tensors: dict[str, Quantized]
    told: dict[str, Any] = field(default_factory=dict)


class Solver:
    """Quantizes layers, in their order.

    Args:
        solve: quantizes one Linear by the method of its choice, of those that need no others.
    """

    def __init__(self, source: Weights, config: DecoderConfig, solve: Solve) -> None:
        self._source, self._config, self._solve = source, config, solve
        self._wanted: list[Tensor] | None = None  # what the last layer gives, in full precision

    def layer(
        self, shard: Sequence[Choice], passage: Passage, seen: Mapping[str, Statistics]
    ) -> Solved:
        """Quantize the Linears of one layer."""
        choices = [choice for choice in shard if choice.grid is not None]
        if not any(choice.method == "auto" for choice in choices):
            return self._by(choices, passage, seen, {})
        tried = self._tried(choices, passage, seen)
        if len(tried) == 1:
            ((name, solved),) = tried.items()
            return replace(solved, told={"method": name} | solved.told)
        found = {name: self._distance(solved, passage) for name, solved in tried.items()}
        best = min(found, key=found.__getitem__)  # of equals the first
        measure = "score_error" if self._config.reward else "kl"
        told = {"method": best, measure: found}
        for solved in tried.values():
            told |= solved.told
        return replace(tried[best], told=told)

    def _tried(
        self, choices: Sequence[Choice], passage: Passage, seen: Mapping[str, Statistics]
    ) -> dict[str, Solved]:
        """The layer by every method that means something else for it, under the method's name."""
        known: dict[tuple[str, str], Quantized] = {}
        found: dict[str, Solved] = {}
        meant: list[list[Choice]] = []
        for name in CANDIDATES:
            try:
                variant = [_by_method(choice, name) for choice in choices]
            except UsageError:  # a grid of this layer does not take it
                continue
            if variant not in meant:
                meant.append(variant)
                found[name] = self._by(variant, passage, seen, known)
        return found

    def _by(
        self,
        choices: Sequence[Choice],
        passage: Passage,
        seen: Mapping[str, Statistics],
        known: dict[tuple[str, str], Quantized],
    ) -> Solved:
        """Each Linear by its own method; `known` {(name, method)} are solved already."""
        tensors: dict[str, Quantized] = {}
        starts: dict[str, QuantizedTensor] = {}
        for choice in choices:
            name, learns = choice.weight.name, choice.method == "autoround"
            first = replace(choice, method="gptq") if learns else choice
            key = name, first.method
            if key not in known:
                known[key] = self._solve(self._source.rows(name), first, seen[name])
            tensors[name] = tensor = known[key]
            if learns:
                assert isinstance(tensor, QuantizedTensor)
                starts[name] = tensor
        if not starts:
            return Solved(tensors)
        values = {name: self._source.rows(name) for name in starts}
        others = {name: t.dequantize() for name, t in tensors.items() if name not in starts}
        refined, learnt = autoround.refine(values, starts, others, passage)
        return Solved(tensors | refined, {"learnt": asdict(learnt)})

    def _distance(self, solved: Solved, passage: Passage) -> float:
        """From what the model gives in full precision, where this layer and those before are not.

        Mean KL of the logits on the windows to measure on; of a reward model, the mean squared
        difference of its scores.
        """
        if self._wanted is None:
            self._wanted = [passage.targets(batch) for batch in passage.judges]
            self._finish(self._wanted, passage)
        layer = passage.load(
            {name: torch.from_numpy(t.dequantize()) for name, t in solved.tensors.items()}
        )
        found = [passage.run(passage.inputs(batch), layer) for batch in passage.judges]
        del layer
        self._finish(found, passage)
        return self._compared(self._wanted, found)

    def _finish(self, hidden: list[Tensor], passage: Passage) -> None:
        """Run each through all later layers, in full precision."""
        for index in range(passage.index + 1, self._config.layers):
            layer = load_layer(self._source, self._config, index)
            for batch, states in enumerate(hidden):
                hidden[batch] = decoder_layer(states, layer, self._config, passage.tables[index])

    def _compared(self, wanted: list[Tensor], found: list[Tensor]) -> float:
        config, top = (
            self._config,
            {w.kind: w.name for w in weights(self._config) if w.layer is None},
        )
        last = Kind.SCORE if config.reward else Kind.EMBEDDING if config.tied else Kind.HEAD
        norm, table = (read_tensor(self._source, top[kind]) for kind in (Kind.FINAL_NORM, last))
        total, tokens = 0.0, 0
        for pair in zip(wanted, found, strict=True):
            for parts in zip(*map(_parts, pair), strict=True):
                expected, given = (head(part, norm, table, config).double() for part in parts)
                total += _difference(expected, given, config.reward)
                tokens += len(given)
        return total / tokens


def _difference(expected: Tensor, given: Tensor, scores: bool) -> float:
    """Sums over (tokens, outputs), float64."""
    if scores:
        return (expected - given).square().sum().item()
    likely, found = expected.log_softmax(-1), given.log_softmax(-1)
    return (likely.exp() * (likely - found)).sum().item()


def _parts(states: Tensor) -> tuple[Tensor, ...]:
    return torch.split(states.flatten(0, -2), _TOKENS_AT_ONCE)


def _by_method(choice: Choice, method: str) -> Choice:
    if choice.method != "auto":
        return choice
    assert choice.grid is not None
    return replace(choice, method=method_of(choice.weight, choice.grid, method))
