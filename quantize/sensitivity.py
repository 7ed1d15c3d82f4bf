"""What each grid of each weight costs: the KL divergence of the logits, predicted one by one.

A weight that moves by D changes its outputs by D x, and the logits by what gradients g say of these
outputs. To second order the KL divergence of the model to itself is then 1/2 tr(G D H D^T), with
H = E[x x^T] over inputs and G = E[g g^T] over gradients of the negative log-likelihood of tokens
that the model itself draws: Fisher's information in Kronecker's form (Martens and Grosse 2015,
arXiv:1503.05671). So one pass forward and one back measure every Linear, and each grid costs
what solving it costs. Tables are tried out: a pass forward for each of their grids.

Losses of several weights add up nearly; what a whole plan loses is measured when it is made. On the
example, 4 bits by GPTQ, predicted losses lie within a factor of 1.5 of measured ones in most
weights (logs correlate by 0.92, at 2 bits by 0.97); after plain rounding, whose errors follow the
inputs, by 0.83 to 0.96.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..architectures import EMBEDDING, DecoderConfig, Kind
from ..checkpoint import Weights, read_json
from ..decoder import (
    SHARED_INPUTS,
    LayerWeights,
    Tables,
    attention_tables,
    decoder_layer,
    load_layer,
)
from ..errors import BadInput, EnvironmentFailed
from .blocks import Quantized
from .calibration import Activations, Progress, same_threads
from .grid import Float32
from .methods import gptq
from .plan import BY_LAYERS, Choice
from .quantizer import rounded
from .streamed_head import StreamedHead
from .windows import Windows

SCHEMA = "slimport.sensitivities/1"
_SEED = 5

Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Losses, and what they were measured of.

    Attributes:
        losses: {weight name: {grid name: KL in nats per token}}, each weight alone on its grid and
            all others in full precision.
        subject: what they were measured of, such as digests of base, adapters and windows.
    """

    losses: Losses
    subject: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Raises EnvironmentFailed: the file cannot be written."""
        content = {"schema": SCHEMA, "subject": self.subject, "losses": self.losses}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise EnvironmentFailed(
                f"the sensitivities cannot be written to {path}",
                error.strerror or str(error),
                "free disk space, or name another file with --sensitivities",
            ) from error

    @classmethod
    def read(cls, path: Path) -> Sensitivities:
        """What `write` wrote.

        Raises:
            BadInput: it is something else.
        """
        content = read_json(path)
        try:
            losses = {
                str(name): {str(grid): float(loss) for grid, loss in row.items()}
                for name, row in content["losses"].items()
            }
            every = [loss for row in losses.values() for loss in row.values()]
            if content["schema"] != SCHEMA or not (np.isfinite(every).all() and min(every) >= 0):
                raise ValueError("another schema, or losses that are no numbers from 0 on")
            return cls(losses, dict(content["subject"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(
                f"{path.name} holds no sensitivities",
                f"{type(error).__name__}: {error}",
                "name another file, or remove it: they are measured again then",
            ) from error


def measure(
    source: Weights,
    config: DecoderConfig,
    windows: Windows,
    options: Mapping[str, Sequence[Choice]],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """The loss of every option: {weight name: {grid name: KL in nats per token}}.

    Args:
        source: full precision.
        options: grids and methods by weight name; layers are solved as if all before them were
            in full precision.
        progress: called with ("sensitivities", steps done, steps in all).

    Raises:
        EnvironmentFailed: no room for the temporary files (4 bytes per token, hidden feature and
            layer, past calibration's IN_MEMORY in all).
    """
    found: dict[str, dict[str, float]] = {}
    steps = 2 * config.layers
    tables = attention_tables(config, windows.ids.shape[1])
    looked_up = [choice for choice in options.get(EMBEDDING, ()) if choice.grid is not None]
    streams = config.layers + 2 + len(looked_up)
    with same_threads(), ExitStack() as stack:

        def stream() -> Activations:
            return stack.enter_context(Activations(windows, config, streams))

        states = [stream()]
        states[0].embed(source, config)
        tried = {choice.grid.name: stream() for choice in looked_up if choice.grid}
        for choice in looked_up:
            assert choice.grid is not None
            tried[choice.grid.name].embed(_Changed(source, choice), config)
        for index in range(config.layers):
            progress("sensitivities", index, steps)
            layer = load_layer(source, config, index)
            states.append(stream())
            _forward(states[index], states[index + 1], layer, config, tables[index])
            for moved in tried.values():
                _forward(moved, moved, layer, config, tables[index])
        head = StreamedHead(source, config)
        for name, choices in options.items():
            if choices[0].weight.is_table:
                found[name] = _of_table(head, source, config, choices, states[-1], tried)
        gradients = stream()
        random = torch.Generator().manual_seed(_SEED)
        for batch in range(gradients.batches):
            gradients.write(batch, head.gradient(states[-1].read(batch), random))
        states.pop()
        for index in reversed(range(config.layers)):
            progress("sensitivities", steps - 1 - index, steps)
            layer = load_layer(source, config, index)
            curvatures = _backward(states.pop(), gradients, layer, config, tables[index])
            for choices in options.values():
                weight = choices[0].weight
                if weight.layer == index:
                    hessian, fisher = curvatures[weight.kind]
                    values = source.rows(weight.name)
                    found[weight.name] = {
                        choice.grid.name: _loss(values, choice, hessian, fisher)
                        for choice in choices
                        if choice.grid is not None
                    }
    progress("sensitivities", steps, steps)
    return {name: found[name] for name in options if name in found}


class _Changed:
    """Weights of which one is what a choice makes of it, in full precision."""

    def __init__(self, source: Weights, choice: Choice) -> None:
        self._source, self._choice = source, choice

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        values = self._source.rows(name, start, stop)
        return _changed(values, self._choice) if name == self._choice.weight.name else values


def _changed(values: Float32, choice: Choice) -> Float32:
    return rounded(np.ascontiguousarray(values), choice, None).dequantize()


def _forward(
    before: Activations,
    after: Activations,
    layer: LayerWeights,
    config: DecoderConfig,
    tables: Tables,
) -> None:
    for batch in range(before.batches):
        after.write(batch, decoder_layer(before.read(batch), layer, config, tables))


def _of_table(
    head: StreamedHead,
    source: Weights,
    config: DecoderConfig,
    choices: Sequence[Choice],
    exact: Activations,
    tried: Mapping[str, Activations],
) -> dict[str, float]:
    """Losses of an embedding or a head, tried out; a tied table is both."""
    found = {}
    for choice in choices:
        if choice.grid is not None:
            looked_up = choice.weight.kind is Kind.EMBEDDING
            other = StreamedHead(_Changed(source, choice), config)
            moved = tried[choice.grid.name] if looked_up else exact
            found[choice.grid.name] = _apart(head, exact, other, moved)
    return found


def divergence(
    source: Weights, other: Weights, config: DecoderConfig, windows: Windows, progress: Progress
) -> float:
    """KL of the logits of one model to those of another of the same config, in nats per token.

    Both stream through one layer at a time.
    """
    tables = attention_tables(config, windows.ids.shape[1])
    with (
        same_threads(),
        Activations(windows, config) as ours,
        Activations(windows, config) as theirs,
    ):
        pairs = ((source, ours), (other, theirs))
        for weights, states in pairs:
            states.embed(weights, config)
        for index in range(config.layers):
            progress("measuring the plan", index, config.layers)
            for weights, states in pairs:
                layer = load_layer(weights, config, index)
                _forward(states, states, layer, config, tables[index])
        return _apart(StreamedHead(source, config), ours, StreamedHead(other, config), theirs)


def _apart(
    head: StreamedHead, exact: Activations, other: StreamedHead, moved: Activations
) -> float:
    lost = 0.0
    for batch in range(exact.batches):
        lost += head.divergence(exact.read(batch), other, moved.read(batch))
    mean: float = lost / exact.tokens
    return mean


class _Products(TorchFunctionMode):
    """Inputs and outputs of the products with a layer's matrices, while they are computed."""

    def __init__(self, layer: LayerWeights) -> None:
        super().__init__()
        self._kinds = {id(layer[kind].weight): kind for kind in layer}
        self.found: dict[Kind, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self.found[self._kinds[id(args[1])]] = args[0], result
        return result


def _backward(
    inputs: Activations,
    gradients: Activations,
    layer: LayerWeights,
    config: DecoderConfig,
    tables: Tables,
) -> dict[Kind, tuple[Tensor, Tensor]]:
    """E[x x^T] and E[g g^T] of every Linear; `gradients` move on to the layer's input.

    The first is one tensor for Linears that read the same input.
    """
    shared = {first: kinds for first, kinds in SHARED_INPUTS.items() if first in layer}
    kinds = [kind for first in shared.values() for kind in first]
    squares = {kind: torch.zeros(2 * layer[kind].weight.shape[1:]) for kind in shared}
    fishers = {kind: torch.zeros(2 * layer[kind].weight.shape[:1]) for kind in kinds}
    for batch in range(inputs.batches):
        with torch.enable_grad(), _Products(layer) as products:
            hidden = inputs.read(batch).requires_grad_()
            output = decoder_layer(hidden, layer, config, tables)
        made = [products.found[kind][1] for kind in kinds]
        moved, *slopes = torch.autograd.grad(output, [hidden, *made], gradients.read(batch))
        gradients.write(batch, moved)
        for kind in shared:
            read = products.found[kind][0].detach().flatten(0, 1)
            squares[kind].addmm_(read.T, read)
        for kind, slope in zip(kinds, slopes, strict=True):
            flat = slope.flatten(0, 1)
            fishers[kind].addmm_(flat.T, flat)
    for total in (*squares.values(), *fishers.values()):
        total /= inputs.tokens
    return {
        kind: (squares[first], fishers[kind]) for first, same in shared.items() for kind in same
    }


def _loss(values: Float32, choice: Choice, hessian: Tensor, fisher: Tensor) -> float:
    """1/2 tr(G D H D^T), in nats per token."""
    moved = torch.from_numpy(_solved(values, choice, hessian.numpy()).dequantize() - values)
    squared: float = (fisher @ moved).mul_(moved @ hessian).sum(dtype=torch.float64).item()
    return max(0.0, squared / 2)


def _solved(values: Float32, choice: Choice, hessian: Float32) -> Quantized:
    assert choice.grid is not None
    if choice.method in BY_LAYERS:  # what learns more is near enough to what it starts from
        return gptq.solve(values, choice.grid, hessian)
    return rounded(values, choice, np.ascontiguousarray(hessian.diagonal()))
