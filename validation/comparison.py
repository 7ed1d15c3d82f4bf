"""Two finished files beside each other: sizes, tensors, and how far their logits lie apart.

Works on bundles and on any GGUF file, whoever made it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle
from ..checkpoint import read_json
from ..errors import BadInput, UsageError
from ..export import gguf
from ..export.gguf.reader import GGUF, Stored, open_gguf
from ..quantize.ggml import dequantize_rows
from ..quantize.windows import Windows, cut, read_text
from . import divergence
from .runtimes import llamacpp

SCHEMA = "slimport.compare/1"

Progress = Callable[[str, int, int], None]

_CHUNK = 1 << 20  # weights dequantized at a time
_WINDOWS, _LENGTH = 64, 512


@dataclass(frozen=True, slots=True)
class _Side:
    """A file and, if it is a bundle's, what the bundle's report says of it, and its adapters."""

    path: Path
    file: GGUF
    report: Mapping[str, Any] | None
    beside: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def context(self) -> int:
        architecture = self.file.metadata.get("general.architecture")
        context = self.file.metadata.get(f"{architecture}.context_length")
        if not isinstance(context, int):
            raise BadInput(
                f"{self.path.name} names no context length",
                "llama.cpp runs a model by what the file's metadata say of it",
                "compare two files that hold models",
            )
        return context


def compare(
    first: Path, second: Path, text: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """What differs between two bundles or GGUF files; the JSON of `slimport compare`.

    Args:
        text: runs both in llama.cpp on this text and compares their logits.

    Returns:
        "schema"; "files" (both: "path", "bytes", "tensor_bytes", "bits_per_weight", and "beside":
        adapters of the bundle, which are not compared); "types" (by ggml type, the tensors and
        bytes of both); "tensors" (every tensor: types, bytes, whether the bytes are "equal", and
        the "relative_rmse" of the second's values to the first's, null where there is none);
        "divergence" (KL(first || second) and more, or null without a text); "reports" (of bundles:
        accuracy against full precision, or null).

    Raises:
        UsageError: no such file, or texts that the two read as other tokens.
        BadInput: neither a bundle nor a GGUF file, a damaged bundle, or a part of a split model.
    """
    sides = _open(first), _open(second)
    windows = _same_windows(*sides, text) if text else None
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "files": [_file(side) for side in sides],
        "types": _types(*sides),
        "tensors": list(_tensors(*sides, progress)),
        "divergence": None,
        "reports": [side.report and side.report["accuracy"] for side in sides],
    }
    if text and windows:
        found["divergence"] = {"text": text.name, **_divergence(*sides, windows, progress)}
    return found


def _open(path: Path) -> _Side:
    if path.is_dir():
        manifest = bundle.verify(path)
        if manifest["container"] != gguf.NAME:
            raise BadInput(
                f"{path} holds no {gguf.FILE}",
                f"its container is {manifest['container']}",
                "compare bundles with container gguf",
            )
        report = path / "report" / "report.json"
        judged = read_json(report) if report.is_file() else None
        beside = [entry["path"] for entry in manifest["files"] if "adapters/" in entry["path"]]
        return _Side(path / gguf.FILE, open_gguf(path / gguf.FILE), judged, tuple(beside))
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist", "a bundle or a .gguf file is compared", "check the path"
        )
    file = open_gguf(path)
    if file.metadata.get("split.count", 1) != 1:
        raise BadInput(
            f"{path.name} is a part of a model",
            f"the model is split into {file.metadata['split.count']} files",
            "join them with llama-gguf-split --merge",
        )
    return _Side(path, file, None)


def _file(side: _Side) -> dict[str, Any]:
    tensors = side.file.tensors.values()
    nbytes = sum(tensor.rows.nbytes for tensor in tensors)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return {
        "path": str(side.path),
        "bytes": side.nbytes,
        "tensor_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "beside": list(side.beside),
    }


def _types(first: _Side, second: _Side) -> dict[str, list[dict[str, int]]]:
    """{type: [tensors and bytes of the first, of the second]}, most bytes first."""
    found: dict[str, list[dict[str, int]]] = {}
    for index, side in enumerate((first, second)):
        for tensor in side.file.tensors.values():
            none = [{"tensors": 0, "bytes": 0}, {"tensors": 0, "bytes": 0}]
            entry = found.setdefault(tensor.type.name, none)[index]
            entry["tensors"] += 1
            entry["bytes"] += tensor.rows.nbytes
    return dict(sorted(found.items(), key=lambda item: -sum(one["bytes"] for one in item[1])))


def _tensors(first: _Side, second: _Side, progress: Progress | None) -> Iterator[dict[str, Any]]:
    """Every tensor of either file, in the order of the first."""
    ours, theirs = first.file.tensors, second.file.tensors
    names = list(dict.fromkeys([*ours, *theirs]))
    for index, name in enumerate(names):
        if progress:
            progress("comparing tensors", index, len(names))
        a, b = ours.get(name), theirs.get(name)
        equal, error = False, None
        if a is not None and b is not None and a.shape == b.shape:
            equal = a.type == b.type and np.array_equal(a.rows, b.rows)
            error = 0.0 if equal else _relative_rmse(a, b)
        yield {
            "name": name,
            "types": [tensor and tensor.type.name for tensor in (a, b)],
            "bytes": [0 if tensor is None else tensor.rows.nbytes for tensor in (a, b)],
            "equal": equal,
            "relative_rmse": error,
        }


def _relative_rmse(a: Stored, b: Stored) -> float | None:
    """Of b's values to a's; None where a's are all zero, or some are no numbers."""
    error = norm = 0.0
    step = max(1, _CHUNK // a.shape[-1])
    for start in range(0, len(a.rows), step):
        part = slice(start, start + step)
        ours, theirs = (
            dequantize_rows(tensor.type, tensor.rows[part], tensor.shape[-1]) for tensor in (a, b)
        )
        error += float(np.square(theirs - ours, dtype=np.float64).sum())
        norm += float(np.square(ours, dtype=np.float64).sum())
    return math.sqrt(error / norm) if norm and math.isfinite(error / norm) else None


def _divergence(
    first: _Side, second: _Side, windows: Windows, progress: Progress | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "first.npy", Path(folder) / "second.npy"
        for side, out in zip((first, second), logits, strict=True):
            stage = progress and partial(progress, f"running {out.stem}")
            llamacpp.logits(side.path, windows.ids, out, progress=stage)
        found = divergence.compare(*logits, windows.ids).to_json()
    del found["histogram"]
    return found


def _same_windows(first: _Side, second: _Side, text: Path) -> Windows:
    """The text as llama.cpp reads it with either file."""
    words = [read_text(text)]
    (a, start), (b, other) = (
        (llamacpp.tokenize(side.path, words)[0], _start(side.path)) for side in (first, second)
    )
    vocabularies = [side.file.metadata.get("tokenizer.ggml.tokens") for side in (first, second)]
    if a != b or start != other or vocabularies[0] != vocabularies[1]:
        raise UsageError(
            "the logits of these files cannot be compared",
            f"{text.name} is {len(a):,} tokens for {first.path.name} and {len(b):,} others for"
            f" {second.path.name}, or their vocabularies differ",
            "leave --eval away, or compare two files of one model",
        )
    length = min(first.context, second.context, _LENGTH)
    return cut(np.array(a, np.int32), start, length, _WINDOWS)


def _start(file: Path) -> list[int]:
    vocabulary = llamacpp.vocabulary(file)
    return [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
