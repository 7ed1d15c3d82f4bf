"""A program without its weights, from Apple's converter in a process of its own.

An operation that is ill-typed does not raise there: it ends the process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from ... import log
from ...architectures import DecoderConfig
from ...errors import EnvironmentFailed, ValidationFailed
from ...quantize.plan import Plan
from ..layout import Layout
from . import sdk
from .bytecode import Skeleton
from .layout import form_of

_WORKER = "slimport.export.coreai.converter"
_AGAIN = "report it with the model's config.json; --container coreml may hold this model"


def convert(config: DecoderConfig, plan: Plan, placed: Layout, context: int) -> Skeleton:
    """The decoder as a program, with placeholders under the names of `placed`.

    Raises:
        DependencyMissing: the converter is not installed.
        ValidationFailed: it fails, or what it wrote has other constants.
        EnvironmentFailed: the system killed it.
    """
    sdk.require()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "Model.aimodel"
        request = {
            "config": config,
            "context": context,
            "stored": {each.name: (each.dtype, each.shape) for each in placed.tensors},
            "forms": {
                choice.weight.name: (form_of(choice), choice.grid.name) if choice.grid else None
                for choice in plan.choices
            },
            "shapes": {choice.weight.name: choice.weight.shape for choice in plan.choices},
            "folder": folder,
        }
        _run(pickle.dumps(request))
        skeleton = Skeleton((folder / "main.mlirb").read_bytes())
    if sorted(skeleton.names) != sorted(placed.by_name):
        differ = sorted(set(skeleton.names) ^ set(placed.by_name))
        raise ValidationFailed(
            "Core AI's compiler changed the weights",
            f"its program has {len(skeleton.names)} constants and not {len(placed.by_name)};"
            f" the first that differs is {', '.join(differ[:1]) or 'there twice'}",
            _AGAIN,
        )
    return skeleton


def _run(request: bytes) -> None:
    command = [sys.executable, "-P", "-m", _WORKER]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=request, capture_output=True, env=environment)
    log.say(f"converter of Core AI ended with status {done.returncode}", done.stdout + done.stderr)
    if done.returncode == 0:
        return
    if done.returncode == -9:
        raise EnvironmentFailed(
            "the converter of Core AI was killed by the system",
            "most likely memory ran out: it takes about 0.5 GB, whatever the size of the model",
            "free memory, or use a larger machine",
        )
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    raise ValidationFailed(
        "Core AI's converter does not take the model",
        said[-1] if said else f"it ended with status {done.returncode} and said nothing",
        _AGAIN,
    )
