"""Logits on disk: float32 (windows, length, vocabulary) in a .npy file, written as they come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, EnvironmentFailed
from ..quantize.grid import Float32


@contextmanager
def writer(path: Path, shape: tuple[int, int, int]) -> Iterator[IO[bytes]]:
    """A file that takes the rows of `shape` in order, as float32 bytes.

    Raises:
        EnvironmentFailed: the disk is full or the folder cannot be written.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield file
    except OSError as error:
        need = math.prod(shape) * 4 / 1e9
        raise EnvironmentFailed(
            f"logits of shape {shape} cannot be written: {error.strerror or error}",
            f"they need {need:.2f} GB of disk",
            "free that much, or validate with fewer windows",
        ) from error


def read(path: Path) -> npt.NDArray[np.float32]:
    """The logits, mapped: float32 (windows, length, vocabulary).

    Raises:
        BadInput: the file is missing, cut short or holds something else.
    """
    try:
        logits: Float32 = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(
            f"logits file {path.name} cannot be read", str(error), "compute the logits again"
        ) from error
    if logits.ndim != 3 or logits.dtype != np.float32:
        raise BadInput(
            f"logits file {path.name} holds {logits.dtype} of shape {logits.shape}",
            "logits are float32 (windows, length, vocabulary)",
            "compute the logits again",
        )
    return logits
