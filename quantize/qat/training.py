"""The training loop: distillation from the full-precision model, the best state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...recipe import Qat
from ..windows import Windows
from .model import Decoder, Output
from .state import State, Store
from .text import Stream
from .workers import Workers, plain, whole

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]

_BETAS = (0.9, 0.95)  # gradients of rounded weights turn fast
_WARM_UP = 0.1  # of all steps
_STAGE = "quantization-aware training"


@dataclass(frozen=True, slots=True)
class Point:
    """Where training stood after a step.

    Attributes:
        loss: mean over the steps since the point before; None at step 0.
        kl: nats per token on held-out text, of the weights as they would ship.
    """

    step: int
    loss: float | None
    kl: float


@dataclass(frozen=True, slots=True)
class Trained:
    """How training went.

    Attributes:
        steps: taken; fewer than asked for if it stopped early.
        parameters: of the best point, whole and on the CPU.
    """

    curve: tuple[Point, ...]
    best: Point
    steps: int
    parameters: Mapping[str, Tensor]


def train(
    teacher: Decoder,
    student: Decoder,
    stream: Stream,
    held_out: Windows,
    settings: Qat,
    store: Store,
    workers: Workers,
    progress: Progress,
    say: Say,
) -> Trained:
    """Train the student's parameters until their held-out KL falls no more, or all steps are done.

    Continues from what `store` holds, and saves into it at every evaluation.
    """
    named = {name: p for name, p in plain(student).named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(_groups(named, settings), betas=_BETAS, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    parts = [ids.to(workers.device) for ids in _parts(held_out, settings.batch)]
    expected = [_logits(teacher, part) for part in parts]
    state = store.load(named, optimizer)
    if state is None:
        first = Point(0, None, _held_out_kl(student, parts, expected))
        state = State(0, (first,), 0.0, _copied(named))
        say(f"step 0 of {settings.steps}: held-out KL {first.kl:.4f}")
    began, resumed = time.monotonic(), state.step
    while state.step < settings.steps and not _stopped(state.curve, settings.patience):
        progress(_STAGE, state.step, settings.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(state.step, settings.steps)
        ids = workers.share(stream.batch(state.step, settings.batch))
        loss = workers.mean(_step(teacher, student, ids, optimizer, settings.hidden_weight))
        state = State(state.step + 1, state.curve, state.loss + loss, state.best)
        if state.step % settings.evaluate_every and state.step < settings.steps:
            continue
        kl = _held_out_kl(student, parts, expected)
        since = state.step - state.curve[-1].step
        curve = (*state.curve, Point(state.step, state.loss / since, kl))
        best = _copied(named) if curve[-1] == _best(curve) else state.best
        state = State(state.step, curve, 0.0, best)
        store.save(state, named, optimizer, workers)
        each = (time.monotonic() - began) / (state.step - resumed)
        say(_line(curve, settings.steps, each * (settings.steps - state.step)))
    progress(_STAGE, settings.steps, settings.steps)
    best = {name: whole(values) for name, values in state.best.items()}
    return Trained(state.curve, _best(state.curve), state.step, best)


def _groups(named: Mapping[str, nn.Parameter], settings: Qat) -> list[dict[str, object]]:
    """Latent weights, factors on scales, norms and biases, and LoRA, each with its rate."""
    rates = {
        "latent": settings.learning_rate,
        "factor": settings.scale_learning_rate,
        "values": settings.norm_learning_rate,
        "a": settings.lora_learning_rate,
        "b": settings.lora_learning_rate,
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in named.items():
        groups[name.rpartition(".")[2]].append(parameter)
    return [{"params": found, "lr": rates[kind]} for kind, found in groups.items() if found]


def _schedule(step: int, steps: int) -> float:
    """A linear rise, under half a cosine that ends at zero."""
    rise = min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _step(
    teacher: Decoder, student: Decoder, ids: Tensor, optimizer: torch.optim.Optimizer, hidden: float
) -> float:
    """One step of the optimizer; the loss before it."""
    with torch.no_grad():
        wanted: Output = teacher(ids, hidden > 0)
    found: Output = student(ids, hidden > 0)
    loss = divergence(wanted.logits, found.logits)
    if hidden:
        loss = loss + hidden * _distance(wanted.hidden, found.hidden)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of logits (windows, length, vocabulary), mean over tokens, in nats."""
    at, of = (functional.log_softmax(logits.flatten(0, 1), -1) for logits in (found, wanted))
    return functional.kl_div(at, of, reduction="batchmean", log_target=True)


def _distance(wanted: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance of hidden states, relative to their size; mean over layers."""
    parts = [
        functional.mse_loss(after, before) / before.square().mean()
        for before, after in zip(wanted, found, strict=True)
    ]
    return torch.stack(parts).mean()


def _parts(windows: Windows, count: int) -> list[Tensor]:
    return list(torch.split(torch.from_numpy(windows.ids.astype(np.int64)), count))


def _logits(decoder: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Output = decoder(ids)
    return found.logits


def _held_out_kl(student: Decoder, parts: list[Tensor], expected: list[Tensor]) -> float:
    total = 0.0
    for ids, wanted in zip(parts, expected, strict=True):
        total += len(ids) * divergence(wanted, _logits(student, ids)).item()
    return total / sum(map(len, parts))


def _best(curve: tuple[Point, ...]) -> Point:
    return min(curve, key=lambda point: point.kl)


def _stopped(curve: tuple[Point, ...], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing."""
    return len(curve) - 1 - curve.index(_best(curve)) >= patience


def _copied(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def _line(curve: tuple[Point, ...], steps: int, seconds: float) -> str:
    last, best = curve[-1], _best(curve)
    return (
        f"step {last.step} of {steps}: loss {last.loss:.4f}, held-out KL {last.kl:.4f}"
        f" (best {best.kl:.4f} at step {best.step}), {_duration(seconds)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
