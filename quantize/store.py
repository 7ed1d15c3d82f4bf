"""The quantized checkpoint on disk: safetensors shards and quantization.json.

A shard per decoder layer, `model-00001-of-00024.safetensors`; in it `<weight>.codes` (packing.py)
and `<weight>.scale` (float16, exact; float32 where the grid's scales have more bits), with zero
points also `<weight>.zero_point` (both without a sign, packed alike), of a palettized grid codes
without a sign and `<weight>.levels` (float16, exact), or `<weight>.blocks` of a ggml type, and
float weights as float32 under their own names. Of a trained one training.json says how it was
trained.
Config, tokenizer and licence files lie beside them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import bundle
from ..architectures import DecoderConfig, decoder_config
from ..checkpoint import LICENSES, TOKENIZER_FILES, read_json
from ..errors import BadInput, EnvironmentFailed, UsageError
from .blocks import BlockGrid, BlockTensor, Quantized
from .grid import Float32
from .packing import row_bytes, unpack, unpack_unsigned
from .palette import PaletteGrid, PaletteTensor
from .plan import Choice, Plan
from .tensor import QuantizedTensor, start_digest, weights_digest

SCHEMA = "slimport.quantized/1"
QUANTIZATION = "quantization.json"
TRAINING = "training.json"

Shard = tuple[Choice, ...]
Append = Callable[[bytes | memoryview], None]


@dataclass(frozen=True, slots=True)
class Origin:
    """What was quantized, for the record.

    Attributes:
        name: the model's name, never a local path.
        base: `sha256:...` of the full-precision base; "" where it is not known.
        adapters: {name: `sha256:...`} of the adapters merged before quantization.
        scales: {name: factor} on their deltas.
    """

    name: str = "model"
    base: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one stored weight.

    Attributes:
        digest: sha256 (hex), as QuantizedTensor.digest, or over the float32 values.
        error: relative RMSE of a quantized weight; 0 for a float one.
        added: the part of `error` that comes from the floor (or ceiling) of its scales.
    """

    digest: str
    error: float = 0.0
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """A finished quantized checkpoint; weights are read when they are asked for.

    It fills the protocol Weights with the dequantized weights. May be read in several threads.

    Attributes:
        config: config.json; `decoder` is the same, understood.
        calibration: digest of the calibration windows; None without a calibrated method.
        records: what is known of each weight, by source name.
        layers: {decoder layer: what was measured there, and what came of it}, of methods that do.
    """

    folder: Path
    config: dict[str, Any]
    decoder: DecoderConfig
    plan: Plan
    origin: Origin
    calibration: str | None
    records: Mapping[str, Record]
    files: Mapping[str, Path]
    layers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Open a folder that `quantize` wrote; reads headers only.

        Raises:
            UsageError: there is no such folder.
            BadInput: it holds something else, or its parts disagree.
        """
        bundle.recover(folder)
        if not folder.is_dir():
            raise UsageError(
                f"{folder} does not exist", "a quantized checkpoint is a folder", "check the path"
            )
        if not (folder / QUANTIZATION).exists():
            raise _malformed(folder, f"there is no {QUANTIZATION} in it")
        content = read_json(folder / QUANTIZATION)
        if content.get("schema") != SCHEMA:
            raise _malformed(folder, f"its schema is {content.get('schema')!r}, not {SCHEMA!r}")
        config = read_json(folder / "config.json")
        decoder = decoder_config(config)
        try:
            plan = Plan.from_json(content["plan"], decoder)
            origin = Origin(**content["origin"])
            records = {name: Record(**entry) for name, entry in content["records"].items()}
            calibration = content["calibration"]
            layers = dict(content.get("layers", {}))
            stated = content["weights_digest"], content["float_digest"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed(folder, f"{QUANTIZATION}: {type(error).__name__} {error}") from error
        if [*records] != [choice.weight.name for choice in plan.choices]:
            raise _malformed(folder, "plan and records name different weights")
        files = _check_shards(folder, plan)
        found = cls(folder, config, decoder, plan, origin, calibration, records, files, layers)
        if (found.weights_digest, found.float_digest) != stated:
            raise _malformed(folder, "the digests of its weights do not add up")
        return found

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def weights_digest(self) -> str:
        """`sha256:...` over all quantized weights."""
        return weights_digest(self._digests(quantized=True))

    @property
    def float_digest(self) -> str:
        """`sha256:...` over all float weights, as float32."""
        return weights_digest(self._digests(quantized=False))

    @property
    def errors(self) -> Mapping[str, float]:
        """Relative RMSE by name, of every quantized weight."""
        return {c.weight.name: self.records[c.weight.name].error for c in self.plan.quantized}

    @property
    def training(self) -> dict[str, Any] | None:
        """The record of `slimport qat`; None: nothing was trained."""
        path = self.folder / TRAINING
        return read_json(path) if path.exists() else None

    def names(self) -> tuple[str, ...]:
        """Source names in the order of the forward pass."""
        return tuple(self.records)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plan[name].weight.shape

    def load(self, name: str) -> Quantized | Float32:
        """One weight, quantized, or float32 values where it has no grid."""
        return self._read(name, 0, self.plan[name].weight.shape[0])

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows [start:stop) of a weight, dequantized: float32."""
        choice = self.plan[name]
        first, last, _ = slice(start, stop).indices(choice.weight.shape[0])
        share = choice.grid.group if isinstance(choice.grid, PaletteGrid) else 1
        begin = first // share * share
        block = self._read(name, begin, -(-last // share) * share)
        values = block if isinstance(block, np.ndarray) else block.dequantize()
        return values if share == 1 else values[first - begin : last - begin]

    def verify(self) -> None:
        """Hash every weight.

        Raises:
            BadInput: one is not what it was when it was written.
        """
        for name, record in self.records.items():
            weight = self.load(name)
            if isinstance(weight, np.ndarray):
                found = float_digest(name, weight)
            else:
                found = weight.digest(name)
            if found != record.digest:
                raise _malformed(self.folder, f"{name} was changed after it was quantized")

    def _digests(self, quantized: bool) -> dict[str, str]:
        chosen = (c.weight.name for c in self.plan.choices if (c.grid is not None) == quantized)
        return {name: self.records[name].digest for name in chosen}

    def _read(self, name: str, start: int, stop: int) -> Quantized | Float32:
        """Rows [start:stop); whole groups of a palettized grid."""
        choice = self.plan[name]
        rows = slice(start, stop)
        try:
            with safe_open(self.files[name], "numpy") as file:
                if choice.grid is None:
                    values: Float32 = file.get_slice(name)[rows]
                    return values
                if isinstance(choice.grid, BlockGrid):
                    blocks = file.get_slice(f"{name}.blocks")[rows]
                    return BlockTensor(choice.grid, blocks)
                packed = file.get_slice(f"{name}.codes")[rows]
                if isinstance(choice.grid, PaletteGrid):
                    groups = slice(start // choice.grid.group, stop // choice.grid.group)
                    levels = file.get_slice(f"{name}.levels")[groups].astype(np.float32)
                    codes = unpack_unsigned(packed, choice.grid.bits, choice.weight.shape[1])
                    return PaletteTensor(choice.grid, codes, levels)
                scale = file.get_slice(f"{name}.scale")[rows]
                zero_point = None
                if choice.grid.asymmetric:
                    zero_point = file.get_slice(f"{name}.zero_point")[rows]
        except (SafetensorError, OSError) as error:
            raise _malformed(self.folder, f"{name} cannot be read: {error}") from error
        bits, columns = choice.grid.bits, choice.weight.shape[1]
        if zero_point is None:
            codes = unpack(packed, bits, columns)
        else:
            points = unpack_unsigned(zero_point, bits, scale.shape[1])
            codes = unpack_unsigned(packed, bits, columns)
            codes.reshape(*points.shape, -1)[...] -= points[:, :, None]
        return QuantizedTensor(choice.grid, codes, scale.astype(np.float32))


def float_digest(name: str, values: Float32) -> str:
    """sha256 (hex) over name, shape and float32 values of a float weight."""
    digest = start_digest(name, "float32", values.shape)
    digest.update(np.ascontiguousarray(values, "<f4").data)
    return digest.hexdigest()


def shards(plan: Plan) -> tuple[Shard, ...]:
    """The weights of each file: one for every decoder layer, one for what is before and after."""
    return tuple(tuple(part) for _, part in groupby(plan.choices, lambda c: c.weight.layer))


@contextmanager
def filling(folder: Path, resumes: bool = False) -> Iterator[None]:
    """Empty the folder, to be filled in the block; gone if anything is raised.

    Args:
        resumes: it is one of our own: what is in it stays at first, and what can be taken up again
            stays if the block is stopped.

    Raises:
        UsageError: `folder` exists and is no quantized checkpoint.
        EnvironmentFailed: the disk is full or read-only.
    """
    if not resumes:
        refuse_foreign(folder)
    with writing(folder):
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=resumes)
    try:
        yield
    except BaseException as error:
        if not bundle.goes_on(folder, error):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError if `folder` holds anything but a quantized checkpoint."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / QUANTIZATION).exists():
        raise UsageError(
            f"{folder} is not replaced",
            "it is there already and holds no quantized checkpoint",
            "name another folder, or remove this one",
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into EnvironmentFailed."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailed(
            f"the quantized checkpoint {folder} cannot be written",
            error.strerror or str(error),
            "free disk space, or name a folder that may be written",
        ) from error


def shard_name(index: int, count: int) -> str:
    """The file of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@contextmanager
def open_shard(folder: Path, index: int, count: int, shard: Shard) -> Iterator[Append]:
    """Shard `index` (from 0) of `count`, its header written; yields a function that appends.

    Append, weight by weight, the packed codes, the scales or levels and the zero points, the
    blocks, or the float values.
    """
    path = folder / shard_name(index, count)
    with writing(folder):
        file = path.open("wb")

    def append(content: bytes | memoryview) -> None:
        with writing(folder):
            file.write(content)

    try:
        append(_header(shard))
        yield append
        with writing(folder):
            file.flush()
    finally:
        with suppress(OSError):  # of a second attempt to write what could not be written
            file.close()


def _header(shard: Shard) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"schema": SCHEMA}}
    end = 0
    for choice in shard:
        for name, (dtype, shape) in _tensors(choice).items():
            begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_metadata(
    folder: Path,
    config: Mapping[str, Any],
    plan: Plan,
    origin: Origin,
    calibration: str | None,
    records: Mapping[str, Record],
    tokenizer_folder: Path,
    layers: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write config.json and quantization.json; copy tokenizer and licence files."""
    quantized = {choice.weight.name for choice in plan.quantized}
    by_kind: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, record in records.items():
        by_kind[name in quantized][name] = record.digest
    content = {
        "schema": SCHEMA,
        "origin": asdict(origin),
        "calibration": calibration,
        "weights_digest": weights_digest(by_kind[True]),
        "float_digest": weights_digest(by_kind[False]),
        "plan": plan.to_json(),
        "records": {name: asdict(record) for name, record in records.items()},
    }
    if layers:
        content["layers"] = dict(layers)
    for pattern in (*TOKENIZER_FILES, *LICENSES):
        for path in sorted(tokenizer_folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    for file, value in (("config.json", config), (QUANTIZATION, content)):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / file).write_text(text + "\n", encoding="utf-8")


_ITEM_BYTES = {"U8": 1, "F16": 2, "F32": 4}
_SCALES = {"<f2": "F16", "<f4": "F32"}


def _tensors(choice: Choice) -> dict[str, tuple[str, list[int]]]:
    """{name: (dtype, shape)} of what is stored for a weight, in the order of its bytes."""
    weight, grid = choice.weight, choice.grid
    if grid is None:
        return {weight.name: ("F32", [*weight.shape])}
    rows, columns = weight.shape
    if isinstance(grid, BlockGrid):
        return {f"{weight.name}.blocks": ("U8", [rows, grid.bytes_of((1, columns))])}
    codes = {f"{weight.name}.codes": ("U8", [rows, row_bytes(columns, grid.bits)])}
    if isinstance(grid, PaletteGrid):
        return codes | {f"{weight.name}.levels": ("F16", [rows // grid.group, grid.size])}
    scale = (_SCALES[grid.scale_dtype], [rows, grid.groups(columns)])
    stored = codes | {f"{weight.name}.scale": scale}
    if grid.asymmetric:
        packed = [rows, row_bytes(grid.groups(columns), grid.bits)]
        stored[f"{weight.name}.zero_point"] = ("U8", packed)
    return stored


def _check_shards(folder: Path, plan: Plan) -> Mapping[str, Path]:
    """{weight: its file}, after comparing every header with the plan."""
    expected = [
        {name: stored for choice in shard for name, stored in _tensors(choice).items()}
        for shard in shards(plan)
    ]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != len(expected):
        raise _malformed(folder, f"it has {len(found)} shards and needs {len(expected)}")
    files: dict[str, Path] = {}
    for path, shard, tensors in zip(found, shards(plan), expected, strict=True):
        try:
            with safe_open(path, "numpy") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                stored = {n: (part.get_dtype(), part.get_shape()) for n, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise _malformed(folder, f"{path.name}: {error}") from error
        if stored != tensors:
            odd = min(n for n in stored | tensors if stored.get(n) != tensors.get(n))
            raise _malformed(
                folder, f"{path.name}: {odd} is {stored.get(odd)}, not {tensors.get(odd)}"
            )
        files |= {choice.weight.name: path for choice in shard}
    return MappingProxyType(files)


def _malformed(folder: Path, why: str) -> BadInput:
    return BadInput(f"{folder} is no intact quantized checkpoint", why, "quantize the model again")
