"""An independent reader: `model.pte` back to codes, scales and source names.

It reads what the operators of both methods are given, in the order in which they run: a product has
the weight that its place among them demands. A hostile file is BadInput, never a crash or a large
allocation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...architectures import EMBEDDING, DecoderConfig, Kind, Weight, weights
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor
from .opened import Lookup, Place, Program, Shared, UInt8, Vector, broken, is_table, malformed
from .products import Product, factor_of

MODEL, WEIGHTS = "model.pte", "base_weights.ptd"
METHODS = ("forward", "all_logits")
MARK = "slimport.base_weights_digest"  # the key of what an adapter says of its base
_MARK_BYTES = 100
_KEY = re.compile(r"(?P<stem>.+?)(\.lookup)?\.(?P<part>codes|scale|weight|bias):[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class File:
    """What the methods of a program compute with.

    Attributes:
        data: the whole files, by their names.
        keys: where that lies what has a name.
        uses: {source name: product or norm}; both methods have the same, in the same order.
        lookup: the embedding, for the kernel.
        stamps: {source name: the digits of its digest that are in its keys}.
        updates: {name of a factor: its key}, such as `model.layers.0.mlp.up_proj.lora_a`.
    """

    data: Mapping[str, UInt8]
    keys: Mapping[str, Place]
    uses: Mapping[str, Product | Vector]
    lookup: Lookup
    stamps: Mapping[str, str]
    updates: Mapping[str, str]

    def array(self, place: Place, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of a file.

        Raises:
            BadInput: the array has another size than its place.
        """
        count = math.prod(shape)
        if place.nbytes != count * np.dtype(dtype).itemsize:
            raise broken(f"{dtype} {shape} does not fill {place.nbytes} bytes at {place.start}")
        return np.frombuffer(self.data[place.file], dtype, count, place.start).reshape(shape)


def open_file(folder: Path, config: DecoderConfig, adapter: Path | None = None) -> File:
    """`model.pte` in `folder`, or the program of an adapter, with the weights beside the first.

    Raises:
        BadInput: a file cannot be read, or its methods compute with other weights than `config`
            has, or in another order.
        DependencyMissing: ExecuTorch is not installed.
    """
    path = adapter or folder / MODEL
    with malformed(path.name):
        shared = Shared(folder / WEIGHTS) if (folder / WEIGHTS).exists() else None
        program = Program(path, shared)
        (uses, lookup), others = (program.uses(name) for name in METHODS)
        if (uses, lookup) != others:
            raise ValueError(f"{METHODS[1]} computes with other weights than {METHODS[0]}")
        factors = {
            name: use.weight
            for use in uses
            if isinstance(use, Product) and (name := factor_of(use.weight))
        }
        if factors and adapter is None:
            raise ValueError(f"it has an update: {min(factors)}")
        if len(factors) != len(program.own) - 1 and adapter is not None:
            raise ValueError("it has a factor twice, or one that nothing is multiplied by")
        plain = [use for use in uses if isinstance(use, Vector) or not factor_of(use.weight)]
        named = {_names(use)[0]: use for use in plain}
        _require_order([name for use in plain for name in _names(use)], config)
        whole = {program.name: program.data} | ({shared.name: shared.data} if shared else {})
        stamps = _stamps(key for key in program.keys if _is_weight(key, adapter is not None))
        return File(whole, program.keys, named, lookup, stamps, factors)


def read_mark(path: Path) -> str:
    """The weights digest of the base that an adapter's program says that it is for.

    Raises:
        BadInput: the file cannot be read, or says none.
        DependencyMissing: ExecuTorch is not installed.
    """
    with malformed(path.name):
        program = Program(path)
        place = program.own.get(MARK)
        if place is None or place.nbytes > _MARK_BYTES:
            raise ValueError("it does not say which base it is for")
        return program.data[place.start : place.stop].tobytes().decode("ascii")


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
        yield weight.name, unpack(file, weight, config, grids.get(weight.name))


def unpack(
    file: File, weight: Weight, config: DecoderConfig, grid: str | None
) -> QuantizedTensor | Float32:
    """One weight: on its grid, or float32 where `grid` is None.

    A float embedding that is tied is the float32 copy, which the kernel has in float16.

    Raises:
        BadInput: as `read_back`; or a tied table is another one as the head.
    """
    if not weight.is_matrix:
        return _vector(file, weight, config)
    if grid is not None and grid not in GRIDS:
        raise broken(f"{weight.name}: there is no grid {grid!r}")
    wanted = None if grid is None else GRIDS[grid]
    if weight.kind is not Kind.EMBEDDING:
        return _multiplied(file, weight, wanted)
    if not config.tied:
        return looked_up(file, weight, wanted)
    found = _multiplied(file, weight, wanted)
    if not _same_table(file, weight, wanted, found):
        raise broken(f"{weight.name} is another matrix as the head")
    return found


def looked_up(file: File, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
    """The embedding as the kernel reads it; float16 becomes float32."""
    table, scale = _lookup_arrays(file, weight, grid)
    if grid is None or scale is None:
        return table.astype(np.float32)
    codes = np.array(table) if grid.bits == 8 else _nibbles(table, high_first=True)
    return _on_grid(weight, grid, codes, scale)


def _lookup_arrays(
    file: File, weight: Weight, grid: Grid | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Table and scales of the kernel, as they lie in the file."""
    found, (rows, columns) = file.lookup, weight.shape
    bits = 16 if grid is None else grid.bits
    width = columns // 2 if bits == 4 else columns
    if found.bits != bits or found.table.shape != (rows, width):
        raise broken(f"{weight.name} is looked up in {found.bits} bits {found.table.shape}")
    table = file.array(found.table.place, found.table.dtype, found.table.shape)
    if grid is None or found.scale is None:
        return table, None
    shape = (rows, grid.groups(columns))
    if found.scale.shape != shape:
        raise broken(f"{weight.name} has scales {found.scale.shape}, not {shape}")
    return table, file.array(found.scale.place, found.scale.dtype, shape)


def _same_table(
    file: File, weight: Weight, grid: Grid | None, head: QuantizedTensor | Float32
) -> bool:
    """Whether the kernel looks up what is multiplied by; the same bytes, where both have 8 bits."""
    if grid is not None and grid.bits == 8:
        _lookup_arrays(file, weight, grid)
        lookup, product = file.lookup, file.uses[weight.name]
        assert isinstance(product, Product) and product.scale and lookup.scale
        places = file.keys[product.weight], file.keys[product.scale]
        return places == (lookup.table.place, lookup.scale.place)
    table = looked_up(file, weight, grid)
    if isinstance(table, QuantizedTensor):
        assert isinstance(head, QuantizedTensor), "both are on the grid"
        return np.array_equal(table.codes, head.codes) and np.array_equal(table.scale, head.scale)
    with np.errstate(over="ignore"):
        return np.array_equal(table, np.asarray(head).astype("<f2").astype(np.float32))


def _multiplied(file: File, weight: Weight, grid: Grid | None) -> QuantizedTensor | Float32:
    """A matrix as XNNPACK multiplies by it."""
    product, (rows, columns) = file.uses[weight.name], weight.shape
    wanted = (32, None) if grid is None else (grid.bits, grid.group)
    if (
        not isinstance(product, Product)
        or product.shape != weight.shape
        or (product.bits, product.group) != wanted
    ):
        raise broken(f"{weight.name} is no product of shape {weight.shape} on the grid {wanted}")
    place, bits = file.keys[product.weight], product.bits
    if grid is None or product.scale is None:
        return np.array(file.array(place, "<f4", (rows, columns)))
    if _source(product.scale) != weight.name:
        raise broken(f"{weight.name} is given {product.scale}")
    shape = (rows, grid.groups(columns))
    if bits == 8:
        scale = file.array(file.keys[product.scale], "<f4", shape)
        return _on_grid(weight, grid, np.array(file.array(place, "|i1", (rows, columns))), scale)
    upper = file.array(file.keys[product.scale], "<u2", shape).astype("<u4")
    packed = file.array(place, "|u1", (rows, columns // 2))
    codes = _nibbles(packed, high_first=False)
    return _on_grid(weight, grid, codes, (upper << np.uint32(16)).view("<f4"))


def _on_grid(
    weight: Weight, grid: Grid, codes: npt.NDArray[np.int8], scale: npt.NDArray[Any]
) -> QuantizedTensor:
    """Codes and scales; a code of 4 bits is within any grid of 4 bits, one of 8 need not be."""
    if grid.levels is not None or codes.min() < grid.low or codes.max() > grid.high:
        raise broken(f"{weight.name} has codes beyond the grid {grid.name}")
    if not ((scale > 0) & np.isfinite(scale)).all():
        raise broken(f"{weight.name} has a scale that is not above 0, or not finite")
    return QuantizedTensor(grid, codes, np.array(scale, np.float32))


def _vector(file: File, weight: Weight, config: DecoderConfig) -> Float32:
    """A norm, or the bias of a product."""
    if weight.is_norm:
        use = file.uses[weight.name]
        kind = "XNNAdd" if config.family.norm_offset else "XNNMultiply"
        if not isinstance(use, Vector) or use.kind != kind:
            raise broken(f"{weight.name} is no norm that an {kind} is given")
        shape, place = use.constant.shape, use.constant.place
        if use.constant.dtype != "<f4":
            raise broken(f"{weight.name} is {use.constant.dtype}")
    else:
        product = file.uses[f"{weight.name.removesuffix('.bias')}.weight"]
        key = product.bias if isinstance(product, Product) else None
        if key is None or _source(key) != weight.name:
            raise broken(f"{weight.name} is not added to its product")
        shape, place = weight.shape, file.keys[key]
    if shape != weight.shape:
        raise broken(f"{weight.name} has shape {shape}, not {weight.shape}")
    return np.array(file.array(place, "<f4", shape))


def _is_weight(key: str, adapter: bool) -> bool:
    """Whether a key should be that of a weight; an adapter has keys of its own too."""
    return not (is_table(key) or (adapter and (key == MARK or factor_of(key))))


def _stamps(keys: Iterable[str]) -> dict[str, str]:
    """{source name: digits of its digest} of the keys of weights."""
    found: dict[str, str] = {}
    for key in keys:
        name, stamp = _source(key), key.rpartition(":")[2]
        if found.setdefault(name, stamp) != stamp:
            raise ValueError(f"{name} has two digests")
    return found


def _names(use: Product | Vector) -> list[str]:
    """The source names of a product's weight and bias, or of a norm."""
    if isinstance(use, Vector):
        return [_source(use.key)]
    return [_source(key) for key in (use.weight, use.bias) if key is not None]


def _require_order(names: Sequence[str], config: DecoderConfig) -> None:
    """ValueError unless these are the weights of a decoder, each once, as one runs them."""
    wanted = [weight.name for weight in weights(config) if weight.kind is not Kind.EMBEDDING]
    if config.tied:
        wanted.append(EMBEDDING)
    for found, expected in zip_longest(names, wanted, fillvalue="nothing"):
        if found != expected:
            raise ValueError(f"{METHODS[0]} computes with {found} in the place of {expected}")


def _source(key: str) -> str:
    """The source name of a weight, of the key of any of its tensors."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key} is not the key of a weight")
    return f"{found['stem']}.{'bias' if found['part'] == 'bias' else 'weight'}"


def _nibbles(packed: UInt8, high_first: bool) -> npt.NDArray[np.int8]:
    """Numbers of 4 bits that were raised by 8: (rows, bytes) to int8 (rows, 2 * bytes)."""
    found = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=found[:, :, int(high_first)])
    np.right_shift(packed, np.uint8(4), out=found[:, :, int(not high_first)])
    found -= np.uint8(8)  # wraps round
    return found.view(np.int8).reshape(len(packed), -1)
