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
        sums: {source name: float32 (inputs,), sums of x^2}; every Linear of the model, and tables
            if they were measured.
        tokens, window: how many were summed over, and in windows of how many.
        texts: names of the texts.
    """

    sums: Mapping[str, Float32]
    tokens: int
    window: int
    texts: tuple[str, ...]

    @property
    def importance(self) -> dict[str, Float32]:
        """{source name: float32 (inputs,), the mean of x^2}."""
        count = np.float32(self.tokens)
        return {name: sums / count for name, sums in self.sums.items()}

    @property
    def digest(self) -> str:
        """`sha256:...` over the lines `name importance`, names sorted, values as they are."""
        digest = hashlib.sha256()
        for name, values in sorted(self.importance.items()):
            digest.update(f"{name}\n".encode())
            digest.update(np.ascontiguousarray(values, "<f4").data)
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
            if weight.name in imatrix.sums:
                writer.add_tensor(weight.gguf + _SUMS, imatrix.sums[weight.name].reshape(1, -1))
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
    found: dict[str, Float32] = {}
    every = set()
    for name, sums in tensors.items():
        stem, dot, what = name.rpartition(".")
        if stem not in by_name or dot + what not in (_SUMS, _COUNTS):
            raise _unusable(path, f"its tensor {name} belongs to no matrix of this model")
        if what == "counts":
            continue
        weight = by_name[stem]
        counts = tensors.get(stem + _COUNTS)
        if counts is None or counts.size != 1 or sums.shape not in _shapes(weight.shape[1]):
            raise _unusable(path, f"{name} has shape {sums.shape} for {weight.shape[1]} inputs")
        if not (sums.dtype == np.float32 and np.isfinite(sums).all() and (sums >= 0).all()):
            raise _unusable(path, f"{name} of {sums.dtype} holds no sums of squares")
        every.add(float(counts.reshape(-1)[0]))
        found[weight.name] = sums.reshape(-1)
    for weight in by_name.values():
        if weight.is_linear and weight.name not in found:
            raise _unusable(path, f"it has no importance of {weight.gguf}")
    tokens = every.pop()
    if every or not (1 <= tokens < 2**53 and tokens.is_integer()) or window < 1:
        raise _unusable(path, f"its sums are over {tokens:g} tokens in windows of {window}")
    return Imatrix(found, int(tokens), window, texts)


def _shapes(inputs: int) -> tuple[tuple[int, ...], ...]:
    return (inputs,), (1, inputs)


def _unusable(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path.name} is no importance matrix of this model",
        why,
        "make one with `slimport imatrix`, or with llama-imatrix --output-format gguf, which"
        " also converts the older format",
    )
