"""One training run: from a full-precision model and a quantized start to trained codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ...architectures import DecoderConfig, Weight
from ...checkpoint import Weights
from ...errors import Unsupported, UsageError
from ...recipe import Qat
from ..blocks import AnyGrid, Quantized
from ..calibration import same_threads
from ..grid import Float32, Grid
from ..plan import Choice, Plan
from ..store import QuantizedCheckpoint
from ..tensor import QuantizedTensor
from ..windows import Windows
from .fake import FakeQuantized
from .lora import Recovered
from .model import Decoder, Plain
from .state import Store
from .text import Stream
from .training import Trained, train
from .workers import Workers, put

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]

SCHEMA = "slimport.training/1"


@dataclass(frozen=True, slots=True)
class Result:
    """A trained student.

    Attributes:
        made: {source name: the module that makes the weight}.
    """

    made: Mapping[str, nn.Module]
    trained: Trained

    def tensors(self, start: QuantizedCheckpoint) -> Iterator[tuple[str, Quantized | Float32]]:
        """Every weight as it ships, in the order of the plan; what did not train is the start's."""
        for choice in start.plan.choices:
            name = choice.weight.name
            module = self.made[name]
            if isinstance(module, FakeQuantized):
                yield name, module.quantized()
            elif isinstance(module, Plain) and module.values.requires_grad:
                yield name, module.values.detach().cpu().numpy().astype(np.float32)
            else:
                yield name, start.load(name)


def trainable(plan: Plan, settings: Qat) -> frozenset[str]:
    """Names of the weights that train on their grids, or to which LoRA is added.

    Raises:
        Unsupported: a layer has a grid whose scales or levels are not learned.
        UsageError: no layer has a grid.
    """
    if settings.train_only == "lora":
        found = frozenset(c.weight.name for c in plan.quantized if c.weight.is_linear)
        return _not_empty(found)
    for choice in plan.quantized:
        if choice.weight.is_linear and not _learned(choice.grid):
            raise Unsupported(
                f"{choice.weight.name} cannot be trained on {choice.grid.name}",  # type: ignore[union-attr]
                "only codes and scales of grids such as int2-g64 or int4-g32 are learned",
                "give another --preset, such as int2, or a pattern with --grid",
            )
    return _not_empty(
        frozenset(c.weight.name for c in plan.quantized if _trains(c, settings.train_tables))
    )


def _not_empty(found: frozenset[str]) -> frozenset[str]:
    if not found:
        raise UsageError(
            "there is nothing to train",
            "every layer of the plan stays float16",
            "give a preset or grids whose groups divide the rows of the layers",
        )
    return found


def _trains(choice: Choice, tables: bool) -> bool:
    return _learned(choice.grid) and (choice.weight.is_linear or tables)


def _learned(grid: AnyGrid | None) -> bool:
    return isinstance(grid, Grid) and grid.levels is None


def run(
    weights: Weights,
    config: DecoderConfig,
    start: QuantizedCheckpoint,
    text: tuple[Stream, Windows],
    settings: Qat,
    store: Store,
    workers: Workers,
    progress: Progress,
    say: Say,
) -> Result | None:
    """Train from `start` towards `weights`; of several processes the first one has the result.

    Args:
        weights: full precision, adapters merged: the teacher.
        text: to train on, and held out.

    Raises:
        BadInput: what a killed run left is damaged.
        EnvironmentFailed: the disk is full or read-only.
    """
    trained = trainable(start.plan, settings)
    with same_threads():

        def student() -> Decoder:
            make = partial(_student, start=start, trained=trained, settings=settings)
            return Decoder(config, make, settings.recompute)

        teacher = Decoder(config, lambda weight: Plain(_tensor(weights, weight)))
        found = train(
            workers.spread(teacher, trains=False),
            workers.spread(student(), trains=True),
            *text,
            settings,
            store,
            workers,
            progress,
            say,
        )
        if not workers.first:
            return None  # `start` may be gone any moment now
        best = student()
        for name, parameter in best.named_parameters():
            if parameter.requires_grad:
                put(parameter, found.parameters[name])
    return Result(best.made_by(), found)


def _student(
    weight: Weight, start: QuantizedCheckpoint, trained: frozenset[str], settings: Qat
) -> nn.Module:
    lora = settings.train_only == "lora"
    if weight.name in trained and lora:
        values = _tensor(start, weight)
        return Recovered(values, settings.lora_rank, weight.name, settings.seed)
    if weight.name in trained:
        quantized = start.load(weight.name)
        assert isinstance(quantized, QuantizedTensor)
        return FakeQuantized(quantized)
    vector = len(weight.shape) == 1
    norms = settings.norm_learning_rate > 0 and not lora
    return Plain(_tensor(start, weight), vector and norms)


def _tensor(source: Weights, weight: Weight) -> torch.Tensor:
    return torch.from_numpy(np.array(source.rows(weight.name), np.float32))


def record(
    settings: Qat, processes: int, text: tuple[Stream, Windows], trained: Trained
) -> dict[str, Any]:
    """training.json: settings, digests and the held-out curve; nothing of this machine."""
    stream, held_out = text
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "processes": processes,
        "text": {"tokens": int(stream.ids.size), "digest": stream.digest},
        "held_out": {"tokens": int(held_out.ids.size), "digest": held_out.digest},
        "steps": trained.steps,
        "best": asdict(trained.best),
        "curve": [asdict(point) for point in trained.curve],
    }
