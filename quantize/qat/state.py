"""What a killed training run leaves behind, so that the same command goes on to the same bytes.

A folder beside the output: `run.json` says which run it is, `start/` is the quantized checkpoint
that training starts from, `state.safetensors` holds parameters, moments of the optimizer and the
best parameters. Each file appears whole, by a rename. There is no generator to save: the windows
of a step follow from the seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import BadInput, UsageError
from ..store import writing
from .workers import Workers, like, put, whole

if TYPE_CHECKING:
    from .training import Point

_RUN, _STATE = "run.json", "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands, beside its parameters and its optimizer.

    Attributes:
        loss: sum over the steps since the last point of the curve.
        best: the parameters of the best point.
    """

    step: int
    curve: tuple[Point, ...]
    loss: float
    best: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of one run."""

    folder: Path

    def save(
        self,
        state: State,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        workers: Workers,
    ) -> None:
        """Replace what was saved before, in one step; every process calls it, the first writes.

        Raises:
            EnvironmentFailed: the disk is full or read-only.
        """
        tensors = {f"best/{name}": whole(values) for name, values in state.best.items()}
        for name, parameter in named.items():
            tensors[f"parameter/{name}"] = whole(parameter)
            moments = optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": whole(moments[moment]) for moment in _MOMENTS}
        if not workers.first:
            return
        curve = json.dumps([asdict(point) for point in state.curve])
        metadata = {"step": str(state.step), "curve": curve}
        path, partial = self.folder / _STATE, self.folder / f"{_STATE}.partial"
        with writing(self.folder):
            save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata)
            _sync(partial)
            partial.replace(path)
            _sync(self.folder)

    def load(
        self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> State | None:
        """Put parameters and moments back where a run was saved; None: there was none.

        Raises:
            BadInput: the file is damaged.
        """
        from .training import Point

        path = self.folder / _STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata()
            for name, parameter in named.items():
                put(parameter, found[f"parameter/{name}"])
                moments = {moment: found[f"{moment}/{name}"] for moment in _MOMENTS}
                optimizer.state[parameter] = {
                    moment: values if moment == "step" else like(parameter, values)
                    for moment, values in moments.items()
                }
            best = {name: like(p, found[f"best/{name}"]) for name, p in named.items()}
            curve = tuple(Point(**entry) for entry in json.loads(metadata["curve"]))
            return State(int(metadata["step"]), curve, 0.0, best)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(
                f"{path} cannot be read", f"{type(error).__name__}: {error}", "begin with --restart"
            ) from error


def open_store(output: Path, run: Mapping[str, Any], restart: bool) -> Store:
    """The store of a run that writes `output`, new or as a killed run left it.

    Args:
        run: what makes this run: equal inputs and settings give an equal value.
        restart: whether to throw away what is there.

    Raises:
        UsageError: another run was killed here.
        EnvironmentFailed: the disk is full or read-only.
    """
    folder = folder_of(output)
    with writing(folder):
        if restart or not (folder / _RUN).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            partial = folder / f"{_RUN}.partial"
            partial.write_text(json.dumps(run, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(folder / _RUN)
            return Store(folder)
        found = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(run))
    if found != wanted:
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        raise UsageError(
            f"{folder} holds a training run that was stopped, and another one than this",
            f"they differ in {', '.join(other)}",
            "give --restart to throw it away, another --output, or the same command again",
        )
    return Store(folder)


def folder_of(output: Path) -> Path:
    """Where a run that writes `output` keeps its state."""
    return output.absolute().with_name(f".{output.name}.training")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
