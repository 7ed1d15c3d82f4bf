"""An .aimodel: a folder of the program, its sha256 and what is said of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...bundle import canonical_json
from ..file import sync_folder, write_aligned, write_bytes
from . import sdk
from .bytecode import Skeleton

ASSET = "Model.aimodel"
PROGRAM, HASH = f"{ASSET}/main.mlirb", f"{ASSET}/main.hash"
METADATA = f"{ASSET}/metadata.json"
HASH_BYTES = hashlib.sha256().digest_size
_VERSION = "2.0"

Content = Callable[[str], Iterable[npt.NDArray[Any]]]


class Part(NamedTuple):
    """Some bytes of a file."""

    name: str
    nbytes: int
    content: Iterable[npt.NDArray[Any]]


def metadata(told: Mapping[str, str]) -> bytes:
    """metadata.json as Apple's library writes it, without the date; `told` is for the app."""
    return canonical_json(
        {
            "assetVersion": _VERSION,
            "creatorDefinedMetadata": dict(told),
            "producer": f"{sdk.CORE} {sdk.VERSIONS[sdk.CORE]}",
        }
    )


def write(
    folder: Path, skeleton: Skeleton, sizes: Mapping[str, int], content: Content, told: bytes
) -> list[Path]:
    """Write and fsync the three files.

    Args:
        sizes, content: {name: bytes} of the constants, and what they hold.
        told: metadata.json.
    """
    (folder / ASSET).mkdir()
    digest = hashlib.sha256()

    def hashed(parts: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
        for part in parts:
            digest.update(part.data)
            yield part

    def tensors() -> Iterator[Part]:
        for part in skeleton.parts(sizes):
            if isinstance(part, str):
                yield Part(part, sizes[part], hashed(content(part)))
            else:
                yield Part("program", len(part), hashed([np.frombuffer(part, np.uint8)]))

    write_aligned(folder / PROGRAM, b"", tensors(), 1)
    write_bytes(folder / HASH, digest.digest())
    write_bytes(folder / METADATA, told)
    sync_folder(folder / ASSET)
    return [folder / PROGRAM, folder / HASH, folder / METADATA]
