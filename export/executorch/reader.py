"""An independent reader: `model.pte` back to codes, scales and source names.

It reads what the operators of both methods are given, in the order in which they run: a product has
the weight that its place among them demands. A hostile file is BadInput, never a crash or a large
allocation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...architectures import DecoderConfig, Kind, Weight, weights
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.tensor import QuantizedTensor
from .held import (
    Held,
    looked_up,
    lookup_arrays,
    nibbles,
    on_grid,
    require_order,
    require_tables,
    source,
    stamps_of,
)
from .opened import Program, Shared, Vector, broken, is_table, malformed
from .products import Product, factor_of

MODEL, WEIGHTS = "model.pte", "base_weights.ptd"
METHODS = ("forward", "all_logits")
MARK = "slimport.base_weights_digest"  # the key of what an adapter says of its base
_MARK_BYTES = 100


@dataclass(frozen=True, slots=True)
class File(Held):
    """What the methods of a program compute with.

    Attributes:
        uses: {source name: product or norm}; both methods have the same, in the same order.
        updates: {name of a factor: its key}, such as `model.layers.0.mlp.up_proj.lora_a`.
    """

    uses: Mapping[str, Product | Vector]
    updates: Mapping[str, str]


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
        plain = [use for use in uses if isinstance(use, Vector) or not factor_of(use.weight)]
        counts = {len(factors), len(uses) - len(plain), len(program.own) - 1}
        if len(counts) > 1 and adapter is not None:
            raise ValueError("it has a factor twice, or one that nothing is multiplied by")
        named = {_names(use)[0]: use for use in plain}
        require_order([name for use in plain for name in _names(use)], config)
        whole = {program.name: program.data} | ({shared.name: shared.data} if shared else {})
        stamps = stamps_of(key for key in program.keys if _is_weight(key, adapter is not None))
        found = File(whole, program.keys, lookup, stamps, named, factors)
        require_tables(found, config)
        return found


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


def _same_table(
    file: File, weight: Weight, grid: Grid | None, head: QuantizedTensor | Float32
) -> bool:
    """Whether the kernel looks up what is multiplied by; the same bytes, where both have 8 bits."""
    if grid is not None and grid.bits == 8:
        lookup_arrays(file, weight, grid)
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
    if source(product.scale) != weight.name:
        raise broken(f"{weight.name} is given {product.scale}")
    shape = (rows, grid.groups(columns))
    if bits == 8:
        scale = file.array(file.keys[product.scale], "<f4", shape)
        return on_grid(weight, grid, np.array(file.array(place, "|i1", (rows, columns))), scale)
    upper = file.array(file.keys[product.scale], "<u2", shape).astype("<u4")
    packed = file.array(place, "|u1", (rows, columns // 2))
    codes = nibbles(packed, high_first=False)
    return on_grid(weight, grid, codes, (upper << np.uint32(16)).view("<f4"))


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
        if key is None or source(key) != weight.name:
            raise broken(f"{weight.name} is not added to its product")
        shape, place = weight.shape, file.keys[key]
    if shape != weight.shape:
        raise broken(f"{weight.name} has shape {shape}, not {weight.shape}")
    return np.array(file.array(place, "<f4", shape))


def _is_weight(key: str, adapter: bool) -> bool:
    """Whether a key should be that of a weight; an adapter has keys of its own too."""
    return not (is_table(key) or (adapter and (key == MARK or factor_of(key))))


def _names(use: Product | Vector) -> list[str]:
    """The source names of a product's weight and bias, or of a norm."""
    if isinstance(use, Vector):
        return [source(use.key)]
    return [source(key) for key in (use.weight, use.bias) if key is not None]
