"""Checkpoints in the formats of others, written from a quantized checkpoint: for transformers.

Codes and scales are packed as they are and read back by the readers of `given`, which share no code
with these packers. transformers loads float tensors in the dtype that they have in the file: all
have one, float16 where every number is exact in it, else float32.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ...checkpoint import LICENSES, SINGLE, TOKENIZER_FILES, Checkpoint
from ...errors import Unsupported, UsageError, ValidationFailed
from ..given import open_given
from ..grid import Grid
from ..plan import FLOAT, Choice, Plan
from ..store import QuantizedCheckpoint, writing
from ..tensor import QuantizedTensor, weights_digest
from . import bitsandbytes, bitsandbytes_double, gptq

_FORMATS: Mapping[str, ModuleType] = MappingProxyType(
    {"gptq": gptq, "bitsandbytes": bitsandbytes, "bitsandbytes-double": bitsandbytes_double}
)
NAMES = tuple(_FORMATS)
_FLOATS = {"float16": "<f2", "float32": "<f4"}
_DTYPES = {"<f4": "F32", "<f2": "F16", "|u1": "U8", "<i4": "I32"}


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the file; `values` makes it when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], npt.NDArray[Any]]


def float_tables(plan: Plan) -> Plan:
    """The plan with embedding and head in float16: these formats have codes for Linears alone."""

    def left(choice: Choice) -> Choice:
        if not choice.weight.is_table or choice.grid is None:
            return choice
        return Choice(choice.weight, None, "", f"a table: stays {FLOAT} in this format")

    return Plan(plan.preset, tuple(map(left, plan.choices)))


def refuse(format: str, plan: Plan) -> None:
    """Raise Unsupported if a grid of the plan is not one of the format's; before work starts."""
    if not plan.quantized:
        raise Unsupported(
            f"a {format} checkpoint of weights in float16 alone",
            "these formats have codes for Linears, and no Linear has a grid",
            _FORMATS[format].CURE,
        )
    for choice in plan.quantized:
        if choice.grid is None or choice.grid.name not in _FORMATS[format].GRIDS:
            raise Unsupported(
                f"{choice.weight.name}: {format} checkpoints cannot hold"
                f" {choice.grid.name if choice.grid else FLOAT}",
                _FORMATS[format].HOLDS,
                _FORMATS[format].CURE,
            )
    _FORMATS[format].refuse(plan)


def write(format: str, model: QuantizedCheckpoint, folder: Path) -> str:
    """Write a checkpoint into a folder, and read every code back; returns its weights digest.

    Raises:
        Unsupported: as `refuse`.
        EnvironmentFailed: the disk is full or read-only.
        ValidationFailed: what was written is not what was to be written.
    """
    refuse(format, model.plan)
    maker = _FORMATS[format]
    dtype = "float16" if _fits_half(model) else "float32"
    config = _plain(model.config)
    config |= {"dtype": dtype, "quantization_config": maker.settings(model.plan, dtype)}
    with writing(folder):
        for pattern in (*TOKENIZER_FILES, *LICENSES):
            for path in sorted(model.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        for name, content in {"config.json": config, **maker.files(model.plan)}.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        _write_tensors(folder / SINGLE, list(_parts(model, maker, _FLOATS[dtype])))
    return _check(model, maker, folder)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without private keys and the dtype of the source, which has two names."""
    dropped = ("dtype", "torch_dtype")
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in dropped}


def _fits_half(model: QuantizedCheckpoint) -> bool:
    """Whether float16 holds all float tensors; matrices are rounded to it already."""
    vectors = [c.weight.name for c in model.plan.choices if not c.weight.is_matrix]
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(rows.astype(np.float16).astype(np.float32), rows)
            for rows in map(model.rows, vectors)
        )


def _parts(model: QuantizedCheckpoint, maker: ModuleType, dtype: str) -> Iterator[_Part]:
    for choice in model.plan.choices:
        weight = choice.weight
        if choice.grid is None:
            yield _Part(
                weight.name, dtype, weight.shape, partial(_float, model, weight.name, dtype)
            )
            continue
        assert isinstance(choice.grid, Grid), "refuse lets no others pass"
        for name, part in maker.tensors(model, choice).items():
            yield _Part(name, *part)


def _float(model: QuantizedCheckpoint, name: str, dtype: str) -> npt.NDArray[Any]:
    return np.ascontiguousarray(model.rows(name), dtype)


def _write_tensors(path: Path, parts: list[_Part]) -> None:
    """One safetensors file, tensor by tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + math.prod(part.shape) * np.dtype(part.dtype).itemsize
        shape, offsets = list(part.shape), [begin, end]
        dtype = _DTYPES[part.dtype]
        entries[part.name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            values = part.values()
            assert values.dtype == part.dtype and values.shape == part.shape, part.name
            file.write(np.ascontiguousarray(values).data)


def _check(model: QuantizedCheckpoint, maker: ModuleType, folder: Path) -> str:
    given = open_given(Checkpoint.open(folder))
    entries = {} if given is None else given.entries
    digests = {}
    for choice in model.plan.quantized:
        name = choice.weight.name
        tensor = model.load(name)
        assert isinstance(tensor, QuantizedTensor), "refuse lets no others pass"
        wanted = maker.meaning(tensor).dequantize()
        found = entries[name].load() if name in entries else None
        # Its grid may have another name: a file does not say that its scales are portable.
        if found is None or not np.array_equal(found.dequantize(), wanted):
            raise ValidationFailed(
                f"{name}: the checkpoint that was written does not hold its codes",
                "it was read back, and its weights are others",
                "write it again; if it stays, report it with the model's config.json",
            )
        digests[name] = found.digest(name)
    return weights_digest(digests)


def refuse_existing(folder: Path) -> None:
    """Raise UsageError if there is anything: no file says that it is slimport's to replace."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not replaced",
            "it is there already, and checkpoints in formats of others replace nothing",
            "name another folder, or remove this one",
        )
