"""The oracle: transformers and peft in float32, in a child process; never our own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import worker
from ..runtime import Generation, Ids, as_lists
from ..worker import Progress

# Matrix products add up in an order that depends on the number of threads: a fixed one, whatever
# the cores, gives the same report on every machine with this CPU.
_THREADS = 4
_WORKER = "slimport.validation.runtimes.reference_worker"


@dataclass(frozen=True, slots=True)
class Oracle:
    """A model that transformers runs in float32.

    Attributes:
        folder: a model folder, or a quantized checkpoint.
        adapter: a PEFT folder that peft applies on top; None where there is none, or where it is
            already merged into the quantized checkpoint.
        scale: multiplies the adapter's own scale.
        quantized: whether `folder` is a quantized checkpoint: its dequantized codes are run.
        reward: whether it is run as a reward model.
    """

    folder: Path
    adapter: Path | None = None
    scale: float = 1.0
    quantized: bool = False
    reward: bool = False

    def _arguments(self, threads: int | None) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "adapter": None if self.adapter is None else str(self.adapter),
            "scale": self.scale,
            "quantized": self.quantized,
            "reward": self.reward,
            "threads": _THREADS if threads is None else threads,
        }


def logits(
    oracle: Oracle,
    windows: Ids,
    out: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, float32 (n, length, vocabulary) into a .npy file.

    Args:
        windows: int32 (n, length) token ids, as they are: nothing is put before them.

    Raises:
        BadInput: transformers or peft cannot load the folders, or weights are left over.
        EnvironmentFailed: memory or disk is full.
    """
    arguments = {"windows": windows.tolist(), "out": str(out), **oracle._arguments(threads)}
    worker.call(_WORKER, "logits", arguments, progress)


def generate(
    oracle: Oracle,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    eos_ids: Sequence[int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy tokens after each prompt of ids.

    Args:
        eos_ids: where to stop; by default what the folder's generation_config.json and
            config.json name.
    """
    arguments: dict[str, Any] = {"prompts": as_lists(prompts)}
    arguments |= {"max_tokens": max_tokens, "eos_ids": None if eos_ids is None else list(eos_ids)}
    found = worker.call(_WORKER, "generate", arguments | oracle._arguments(threads), progress)
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def scores(
    oracle: Oracle,
    texts: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """The score of each text of ids by a reward model, each text alone."""
    arguments = {"texts": as_lists(texts), **oracle._arguments(threads)}
    found: list[float] = worker.call(_WORKER, "scores", arguments, progress)
    return found


def sample(
    oracle: Oracle,
    start: int,
    count: int,
    length: int,
    seed: int,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Ids:
    """Text sampled from the model itself at temperature 1, for users who give none.

    Args:
        start: the first id of every window: begin-of-sequence, or end-of-sequence without one.

    Returns:
        int32 (count, length); the same seed gives the same ids.
    """
    arguments = {"start": start, "count": count, "length": length, "seed": seed}
    found = worker.call(_WORKER, "sample", arguments | oracle._arguments(threads), progress)
    return np.asarray(found, np.int32).reshape(count, length)
