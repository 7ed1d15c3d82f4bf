"""A finished file against the quantized checkpoint it was made from, weight by weight.

Two witnesses, neither of which shares code with the packer: reader.py for the codes, and ggml's own
`dequantize_row_*` for the values.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import Weight
from ...errors import ValidationFailed
from ...quantize.compiled import compiled
from ...quantize.ggml import Type, dequantize_rows
from ...quantize.grid import Float32, Int8
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor, weights_digest
from ..container import ReadBack
from .reader import Stored, matched, open_gguf, source_rows, unpack

_CHUNK = 1 << 20  # weights dequantized at a time: the block stays in the CPU's cache


def check(model: QuantizedCheckpoint, path: Path, threads: int = 2) -> ReadBack:
    """Read `path` back and compare every code, scale and value with `model`.

    Memory: the codes of one weight per thread, twice.

    Raises:
        BadInput: the file is malformed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    file = open_gguf(path)
    digests: dict[str, str] = {}
    errors: dict[str, float] = {}

    def one(pair: tuple[Weight, Stored]) -> None:
        weight, stored = pair
        expected = model.load(weight.name)
        grid = expected.grid.name if isinstance(expected, QuantizedTensor) else None
        found = unpack(path, stored, weight, model.decoder, grid)
        rows = source_rows(weight, model.decoder)
        _agree_with_ggml(weight.name, stored, found, rows)
        if isinstance(found, QuantizedTensor) and isinstance(expected, QuantizedTensor):
            _same_codes(weight.name, found, expected)
            digests[weight.name] = found.digest(weight.name)
        elif isinstance(found, np.ndarray) and isinstance(expected, np.ndarray):
            errors[weight.name] = _float_error(weight.name, stored, found, expected)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, matched(file, model.decoder)))
    return ReadBack(weights_digest(digests), digests, dict(sorted(errors.items())))


def _same_codes(name: str, found: QuantizedTensor, expected: QuantizedTensor) -> None:
    _same(name, "the code", found.codes, expected.codes)
    _same(name, "the scale", found.scale, expected.scale)


def _float_error(name: str, stored: Stored, found: Float32, expected: Float32) -> float:
    """Largest absolute error; nothing but rounding to the stored type is allowed."""
    rounded = expected.astype("<f4" if stored.type == Type.F32 else "<f2")
    _same(name, "the weight", found, rounded.astype(np.float32))
    return float(np.abs(found - expected).max(initial=0))


def _same(name: str, what: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    if not np.array_equal(found, expected):
        place = tuple(np.argwhere(found != expected)[0])
        where = f"{what} at {', '.join(map(str, place))}"
        raise _differs(name, where, found[place], f"not {expected[place]}")


def _agree_with_ggml(
    name: str,
    stored: Stored,
    found: QuantizedTensor | Float32,
    rows: npt.NDArray[np.int64],
) -> None:
    columns = stored.shape[-1]
    step = max(1, _CHUNK // columns)
    for start in range(0, len(stored.rows), step):
        part = slice(start, start + step)
        values = dequantize_rows(stored.type, stored.rows[part], columns)
        if isinstance(found, QuantizedTensor):
            place = _first_difference(values, found.codes, found.scale, rows[part])
        else:
            read = found[rows[part]] if found.ndim == 2 else found[rows][None]
            place = -1 if np.array_equal(values, read) else int(np.argmax(values != read))
        if place >= 0:
            row, column = divmod(place, columns)
            where = f"row {start + row}, column {column} of the file"
            raise _differs(name, where, values[row, column], "by ggml and otherwise by slimport")


@compiled
def _first_difference(
    values: Float32, codes: Int8, scale: Float32, rows: npt.NDArray[np.int64]
) -> int:
    """Position of the first value that is not its code times its scale, or -1."""
    columns: int = codes.shape[1]
    group = columns // scale.shape[1]
    for row in range(values.shape[0]):
        source = rows[row]
        differing = 0
        for first in range(0, columns, group):
            factor = scale[source, first // group]
            for column in range(first, first + group):
                differing += values[row, column] != np.float32(codes[source, column]) * factor
        if differing:
            for column in range(columns):
                factor = scale[source, column // group]
                if values[row, column] != np.float32(codes[source, column]) * factor:
                    return row * columns + column
    return -1


def _differs(name: str, where: str, found: object, instead: str) -> ValidationFailed:
    return ValidationFailed(
        f"{name}: the file does not hold what was quantized",
        f"{where} reads {found}, {instead}",
        "export again; if it stays, report it with the model's config.json",
    )
