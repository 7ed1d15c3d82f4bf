"""Importance matrices: the mean of x^2 of every Linear's inputs, in llama.cpp's GGUF format.

The format is that of llama.cpp's tools/imatrix: `<tensor>.in_sum2` holds sums of x^2 and
`<tensor>.counts` over how many tokens, under llama.cpp's tensor names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from ..architectures import DecoderConfig, weights
from ..errors import BadInput, EnvironmentFailed, UsageError
from .grid import Float32

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Imatrix:
    """What each input of each weight matters.

    Attributes:
        importance: {source name: float32 (inputs,)}; every Linear of the model, and tables if they
            were measured.
        tokens, window: how many were averaged over, and in windows of how many.
        texts: names of the texts.
    """

    importance: Mapping[str, Float32]
    tokens: int
    window: int
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """`sha256:...` over the lines `name importance`, names sorted, values as they are."""
        digest = hashlib.sha256()
        for name in sorted(self.importance):
            digest.update(f"{name}\n".encode())
            digest.update(np.ascontiguousarray(self.importance[name], "<f4").data)
        return "sha256:" + digest.hexdigest()


def write(imatrix: Imatrix, path: Path, config: DecoderConfig) -> None:
    """Write a file that llama-quantize reads.

    Raises:
        UsageError: `path` exists.
        EnvironmentFailed: the disk is full or read-only.
    """
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    try:
        writer = GGUFWriter(partial, "")
        writer.kv_data[0].clear()  # an importance matrix has no architecture
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.texts))
        writer.add_uint32("imatrix.chunk_count", imatrix.tokens // imatrix.window)
        writer.add_uint32("imatrix.chunk_size", imatrix.window)
        counts = np.full((1, 1), imatrix.tokens, np.float32)
        for weight in weights(config):
            if weight.name in imatrix.importance:
                sums = imatrix.importance[weight.name] * np.float32(imatrix.tokens)
                writer.add_tensor(weight.gguf + _SUMS, sums.reshape(1, -1))
                writer.add_tensor(weight.gguf + _COUNTS, counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EnvironmentFailed(
            f"{path} cannot be written",
            error.strerror or str(error),
            "free disk space, or name a folder that may be written",
        ) from error


def refuse_existing(path: Path) -> None:
    """Raise UsageError if there is a file already."""
    if path.exists():
        raise UsageError(f"{path} exists", "it is not overwritten", "give another --output")


def read(path: Path, config: DecoderConfig) -> Imatrix:
    """Read an importance matrix of this model.

    Raises:
        BadInput: no importance matrix in GGUF, one of another model, or a Linear is missing.
    """
    try:
        reader = GGUFReader(path)
        kind = reader.fields["general.type"].contents()
        texts = tuple(map(str, reader.fields["imatrix.datasets"].contents()))
        window = int(reader.fields["imatrix.chunk_size"].contents())
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    if kind != "imatrix":
        raise _unusable(path, f"its general.type is {kind!r}, not 'imatrix'")
    by_name = {weight.gguf: weight for weight in weights(config) if weight.is_matrix}
    importance: dict[str, Float32] = {}
    tokens = 0
    for name, sums in tensors.items():
        stem, dot, what = name.rpartition(".")
        if stem not in by_name or dot + what not in (_SUMS, _COUNTS):
            raise _unusable(path, f"its tensor {name} belongs to no matrix of this model")
        if what == "counts":
            continue
        weight = by_name[stem]
        counts = tensors.get(stem + _COUNTS)
        if counts is None or counts.size != 1 or sums.size != weight.shape[1]:
            raise _unusable(path, f"{name} has shape {sums.shape} for {weight.shape[1]} inputs")
        count = float(counts.reshape(-1)[0])
        if not (count > 0 and np.isfinite(sums).all() and (sums >= 0).all()):
            raise _unusable(path, f"{name} holds no sums of squares of {count:g} tokens")
        tokens = max(tokens, int(count))
        importance[weight.name] = (sums.reshape(-1) / np.float32(count)).astype(np.float32)
    for weight in by_name.values():
        if weight.is_linear and weight.name not in importance:
            raise _unusable(path, f"it has no importance of {weight.gguf}")
    return Imatrix(importance, tokens, window, texts)


def _unusable(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path.name} is no importance matrix of this model",
        why,
        "make one with `slimport imatrix`, or with llama-imatrix --output-format gguf",
    )
