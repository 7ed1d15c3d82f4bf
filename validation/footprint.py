"""What a bundle takes from a device: bytes on disk, bytes to download, bytes of memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .runtime import Memory

_CHUNK = 2**20
_LEVEL = 6  # deflate as stores compress a download


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes in bytes.

    Attributes:
        device_bytes: all that goes onto the device.
        download_bytes: the same, each file compressed with deflate: near what a store transfers.
        model_bytes: the model file or files.
        memory: for the target's CPU at its context.
        isa: the CPU features that parts of `memory` are predicted for.
        predicted: the parts.
    """

    device_bytes: int
    download_bytes: int
    model_bytes: int
    memory: Memory
    isa: tuple[str, ...]
    predicted: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json; `predicted` names what was not measured here, and for what."""
        return {
            "device_bytes": self.device_bytes,
            "download_bytes": self.download_bytes,
            "model_bytes": self.model_bytes,
            "memory": self.memory.to_json(),
            "predicted": {
                "for": list(self.isa),
                "keys": [f"memory.{part}" for part in self.predicted],
            },
        }


def footprint(
    device_files: Iterable[Path],
    model_files: Sequence[Path],
    memory: Memory,
    isa: Sequence[str],
    predicted: Sequence[str],
) -> Footprint:
    """Add up files and memory; `memory` is the runtime's, with parts predicted for `isa`.

    Raises:
        BadInput: a file cannot be read.
    """
    files = sorted(device_files)
    return Footprint(
        device_bytes=sum(map(_size, files)),
        download_bytes=sum(map(compressed_size, files)),
        model_bytes=sum(map(_size, model_files)),
        memory=memory,
        isa=tuple(isa),
        predicted=tuple(predicted),
    )


def compressed_size(file: Path) -> int:
    """Bytes of one file after deflate, its pieces of 1 MiB compressed apart, in threads."""
    try:
        with file.open("rb") as source, ThreadPoolExecutor() as pool:
            descriptor = source.fileno()

            def compressed(start: int) -> int:
                return len(zlib.compress(os.pread(descriptor, _CHUNK, start), _LEVEL))

            return sum(pool.map(compressed, range(0, _size(file), _CHUNK)))
    except OSError as error:
        raise _unreadable(file, error) from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> BadInput:
    return BadInput(
        f"{file.name} cannot be read",
        error.strerror or str(error),
        "export the bundle again",
    )
