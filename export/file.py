"""Files of aligned tensors, written one part at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

Parts = Iterable[npt.NDArray[Any]]


def write_aligned(
    path: Path, start: bytes, tensors: Iterable[tuple[str, int, Parts]], alignment: int
) -> None:
    """Write and fsync a file: `start`, then every tensor, filled up to `alignment`.

    What is written goes to the disk behind our back, so that little is left for the last fsync.

    Args:
        tensors: name, bytes, and the content in contiguous parts.
    """
    with path.open("wb") as file, ThreadPoolExecutor(1) as behind:
        file.write(start)
        flushing = behind.submit(os.fdatasync, file.fileno())
        for name, size, parts in tensors:
            written = sum(file.write(part.data) for part in parts)
            if written != size:
                raise ValueError(f"{name}: {written} bytes instead of {size}")
            file.write(bytes(-written % alignment))
            if flushing.done():
                flushing.result()
                flushing = behind.submit(os.fdatasync, file.fileno())
        file.flush()
        flushing.result()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write and fsync a small file."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names of its files durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
