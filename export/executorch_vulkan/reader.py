"""An independent reader: `model.pte` back to codes, scales and source names.

The program must be the one loop that gives the graph a part of the prompt at a time. Of the graph
it is read what the operators are given, in the order in which they run: a product has the weight
that its place among them demands. A hostile file is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor
from ..executorch.held import (
    Held,
    looked_up,
    nibbles,
    on_grid,
    require_order,
    require_tables,
    rows_of,
    stamps_of,
)
from ..executorch.opened import Program, broken, is_table, malformed
from .blob import Call, read_graph
from .outside import read_loop

MODEL, METHOD = "model.pte", "forward"
_BITS = {
    "et_vk.linear_q4gsw.default": 4,
    "et_vk.linear_q8csw.default": 8,
    "aten.linear.default": 32,
}


class Part(NamedTuple):
    """Some rows of a matrix, as one product takes them: what they are, and their keys.

    `bits` of a code; 32: float32 numbers. `group`: columns that share a scale; None: all of a row.
    """

    bits: int
    group: int | None
    shape: tuple[int, int]
    weight: str
    scale: str | None
    bias: str | None


@dataclass(frozen=True, slots=True)
class File:
    """What a program computes with.

    Attributes:
        matrices: {source name: its parts, in the order of their rows}.
        norms: {source name: key, and how many numbers}.
    """

    held: Held
    matrices: Mapping[str, tuple[Part, ...]]
    norms: Mapping[str, tuple[str, int]]
    config: DecoderConfig

    def unpack(self, weight: Weight, grid: str | None) -> QuantizedTensor | Float32:
        """One weight: on its grid, or float32 where `grid` is None.

        A float embedding that is tied is the float32 copy, which the kernel has in float16.

        Raises:
            BadInput: it has another shape or grid, or a tied table is another one as the head.
        """
        if not weight.is_matrix:
            return self._vector(weight)
        if grid is not None and grid not in GRIDS:
            raise broken(f"{weight.name}: there is no grid {grid!r}")
        wanted = None if grid is None else GRIDS[grid]
        if weight.kind is not Kind.EMBEDDING:
            return self._multiplied(weight, wanted)
        table = looked_up(self.held, weight, wanted)
        if not self.config.tied:
            return table
        found = self._multiplied(weight, wanted)
        if not _same(table, found):
            raise broken(f"{weight.name} is another matrix as the head")
        return found

    def _multiplied(self, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
        """A matrix as the GPU multiplies by it."""
        parts, columns = self.matrices[weight.name], weight.shape[1]
        wanted = (32, None) if grid is None else (grid.bits, grid.group)
        if any((part.bits, part.group, part.shape[1]) != (*wanted, columns) for part in parts):
            raise broken(f"{weight.name} is not multiplied on the grid {wanted}, or has other rows")
        if sum(part.shape[0] for part in parts) != weight.shape[0]:
            raise broken(f"{weight.name} has not {weight.shape[0]} rows")
        if grid is None:
            return np.concatenate([self._array(p.weight, "<f4", p.shape) for p in parts])
        codes = np.concatenate([self._codes(part) for part in parts])
        scale = np.concatenate([self._scale(part) for part in parts])
        return on_grid(weight, grid, codes, scale)

    def _codes(self, part: Part) -> Any:
        rows, columns = part.shape
        if part.bits == 8:
            return self._array(part.weight, "|i1", part.shape)
        return nibbles(self._array(part.weight, "|u1", (rows, columns // 2)), high_first=False)

    def _scale(self, part: Part) -> Any:
        """(rows, groups)"""
        rows, columns = part.shape
        assert part.scale is not None, "it has codes"
        if part.group is None:
            return self._array(part.scale, "<f4", (rows, 1))
        return self._array(part.scale, "<f4", (columns // part.group, rows)).T

    def _vector(self, weight: Weight) -> Float32:
        """A norm, or the bias of a product."""
        if weight.is_norm:
            key, count = self.norms[weight.name]
            found = [self._array(key, "<f4", (count,))]
        else:
            parts = self.matrices[f"{weight.name.removesuffix('.bias')}.weight"]
            found = [self._array(p.bias, "<f4", p.shape[:1]) for p in parts if p.bias is not None]
        whole: Float32 = np.concatenate([np.empty(0, "<f4"), *found])
        if whole.shape != weight.shape:
            raise broken(f"{weight.name} has shape {whole.shape}, not {weight.shape}")
        return whole

    def _array(self, key: str, dtype: str, shape: tuple[int, ...]) -> Any:
        return self.held.array(self.held.keys[key], dtype, shape)


def open_file(folder: Path, config: DecoderConfig) -> File:
    """`model.pte` in `folder`.

    Raises:
        BadInput: it cannot be read, or computes with other weights than `config` has, or in another
            order.
        DependencyMissing: ExecuTorch is not installed.
    """
    with malformed(MODEL):
        program = Program(folder / MODEL)
        lookup, payload = read_loop(program, METHOD)
        graph = read_graph(payload, {key: place.nbytes for key, place in program.keys.items()})
        matrices: dict[str, tuple[Part, ...]] = {}
        norms: dict[str, tuple[str, int]] = {}
        names: list[str] = []
        for found in map(_use, graph.calls):
            if isinstance(found, Part):
                names += _joined(found, matrices, names)
            elif found is not None:
                name = rows_of(found[0]).name
                norms[name] = found
                names.append(name)
        require_order(names, config)
        for name, parts in matrices.items():
            _require_rows(name, parts)
        stamps = stamps_of(key for key in program.keys if not is_table(key))
        held = Held({program.name: program.data}, program.keys, lookup, stamps)
        require_tables(held, config, repeats=2)
        return File(held, matrices, norms, config)


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, under its source name and in source row order.

    Args:
        config: of the decoder that the file should hold.
        grids: {source name: grid name} of the quantized weights.

    Raises:
        BadInput: malformed, a weight missing, or on another grid or of another shape.
        DependencyMissing: ExecuTorch is not installed.
    """
    file = open_file(folder, config)
    for weight in weights(config):
        yield weight.name, file.unpack(weight, grids.get(weight.name))


def _use(call: Call) -> Part | tuple[str, int] | None:
    """What of the file's weights an operator is given: rows of a matrix, or a norm."""
    name, args = call
    if name in _BITS:
        return _part(call)
    if name == "et_vk.rms_norm.default" and not is_table(args[1].key):
        (count,) = args[1].shape
        return args[1].key, count
    for each in args:
        key = getattr(each, "key", None)
        if key is not None and not is_table(key):
            raise ValueError(f"{name} is given {key}")
    return None


def _part(call: Call) -> Part:
    bits, (x, weight, *others) = _BITS[call.name], call.args
    scale, group = (others.pop(0), None) if bits != 32 else (None, None)
    if bits == 4:
        group = others.pop(0)
    bias, made = others
    rows, columns = weight.shape[0], weight.shape[1] * (2 if bits == 4 else 1)
    wanted = {4: "uint8", 8: "int8", 32: "float32"}[bits], (rows,)
    if group is not None and (group < 1 or columns % group):
        raise ValueError(f"{weight.key}: groups of {group} do not divide {columns} inputs")
    scales = (rows,) if group is None else (columns // group, rows)
    if (weight.dtype, made.shape[-1:]) != wanted or x.shape[-1] != columns:
        raise ValueError(f"{weight.key} is no matrix of {rows} rows and {columns} columns")
    if scale and (scale.dtype, scale.shape) != ("float32", scales):
        raise ValueError(f"{weight.key} has not scales {scales}, one for each output or group")
    if bias and (bias.dtype, bias.shape) != ("float32", (rows,)):
        raise ValueError(f"the bias of {weight.key} is no float32 vector of {rows} numbers")
    found = Part(bits, group, (rows, columns), weight.key, scale and scale.key, bias and bias.key)
    _require_names(found)
    return found


def _require_names(part: Part) -> None:
    """ValueError unless all keys are of the same weight and the same rows."""
    name, kind, rows = rows_of(part.weight)
    beside = [("scale", part.scale, name), ("bias", part.bias, f"{name[: -len('weight')]}bias")]
    for what, key, of in beside:
        if key is not None and rows_of(key) != (of, what, rows):
            raise ValueError(f"{part.weight} is multiplied with {key}")
    if kind != ("weight" if part.bits == 32 else "codes"):
        raise ValueError(f"{part.weight} is multiplied")


def _joined(part: Part, matrices: dict[str, tuple[Part, ...]], names: list[str]) -> list[str]:
    """The source names that a product begins: none for more rows of the one before."""
    name = rows_of(part.weight).name
    bias = [] if part.bias is None else [rows_of(part.bias).name]
    before = matrices.get(name, ())
    more = bool(before) and names[-1] == (bias[0] if bias else name)
    matrices[name] = (*before, part)
    return [] if more else [name, *bias]


def _require_rows(name: str, parts: tuple[Part, ...]) -> None:
    """ValueError unless keys name all rows of a matrix, each once and in their order."""
    start = 0
    for part in parts:
        named = rows_of(part.weight).rows
        stop = start + part.shape[0]
        if named != ((start, stop) if len(parts) > 1 else None):
            raise ValueError(f"{name}: rows {start} to {stop} are those of {part.weight}")
        start = stop


def _same(table: QuantizedTensor | Float32, head: QuantizedTensor | Float32) -> bool:
    """Whether the kernel looks up what is multiplied by."""
    if isinstance(table, QuantizedTensor) and isinstance(head, QuantizedTensor):
        return np.array_equal(table.codes, head.codes) and np.array_equal(table.scale, head.scale)
    values = head.dequantize() if isinstance(head, QuantizedTensor) else head
    with np.errstate(over="ignore"):
        return np.array_equal(np.asarray(table), values.astype("<f2").astype(np.float32))
