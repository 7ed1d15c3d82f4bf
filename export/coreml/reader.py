"""An independent reader: a package back to codes, scales and source names.

It reads what the operations of the program say, by the names of what they make, and unpacks bits by
itself. The same tensors are read by Apple's own library too, which came with coremltools. A hostile
package is BadInput, never a crash or a large allocation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from ...architectures import DecoderConfig, Weight, weights
from ...architectures.rotation import turns
from ...errors import BadInput
from ...quantize.blocks import Quantized
from ...quantize.grid import GRIDS, Float32, Grid
from ...quantize.palette import PALETTE_GRIDS, PaletteGrid, PaletteTensor
from ...quantize.tensor import QuantizedTensor
from .blobs import TYPES, Blobs, Place, place_of
from .proto import messages

_AGAIN = "_again"  # behind the name of a table that is made twice
_SCALED, _LOOKED_UP = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"


class File:
    """A package whose program was read: operations by the names of what they make.

    Args:
        vectors: the type of norms, biases and tables of ropes.
    """

    def __init__(self, package: Path, vectors: str = "<f4") -> None:
        self.name, self._vectors = package.name, vectors
        with self._checked():
            manifest = json.loads((package / "Manifest.json").read_text("utf-8"))
            root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            if root != "com.apple.CoreML/model.mlmodel":
                raise ValueError(f"its manifest names {root}")
            folder = package / "Data" / "com.apple.CoreML"
            model = messages("Model").Model.FromString((folder / "model.mlmodel").read_bytes())
            self._blobs = Blobs(folder / "weights" / "weight.bin")
            functions = model.mlProgram.functions
            self._names = sorted(functions)
            self._blocks = [
                functions[name].block_specializations[functions[name].opset] for name in self._names
            ]
            if not self._blocks:
                raise ValueError("it has no function")
            self._made = [
                {
                    output.name: operation
                    for operation in block.operations
                    for output in operation.outputs
                }
                for block in self._blocks
            ]

    def has(self, name: str) -> bool:
        """Whether its functions hold a weight."""
        return all(_name(name) in made for made in self._made)

    def unpack(self, weight: Weight, grid: str | None) -> Quantized | Float32:
        """One weight: on its grid, or float32 where `grid` is None.

        Raises:
            BadInput: it is missing, has another shape or grid, or two functions, or two operations
                of one, have two of it.
        """
        with self._checked(weight.name):
            names = [_name(weight.name), _name(weight.name) + _AGAIN]
            found = {
                self._value(made, name, grid)
                for made in self._made
                for name in names
                if name == names[0] or name in made
            }
            if len(found) != 1:
                raise ValueError(f"{weight.name} is read from {len(found)} different places")
            (places,) = found
            return self._unpacked(places, weight, grid)

    def _value(self, made: Mapping[str, Any], name: str, grid: str | None) -> tuple[Place, ...]:
        """Where a weight lies: its numbers; or its codes, scales or levels, or both."""
        operation = made.get(name)
        if operation is None:
            raise ValueError("it is not there")
        if grid is None:
            if operation.type != "const":
                raise ValueError(f"{name} is made by {operation.type}")
            return (place_of(operation.attributes["val"]),)
        if grid in PALETTE_GRIDS:
            return self._looked_up(operation, name)
        asymmetric = GRIDS[grid].asymmetric
        if operation.type != _SCALED or asymmetric != ("offset" in operation.inputs):
            what = "has no offset" if asymmetric else "has an offset"
            raise ValueError(f"{name} is made by {operation.type}, or {what}")
        data, scale = (operation.inputs[key].arguments[0] for key in ("data", "scale"))
        if asymmetric:
            offset = operation.inputs["offset"].arguments[0]
            return tuple(place_of(each.value) for each in (data, scale, offset))
        if data.WhichOneof("binding") == "value":
            return place_of(data.value), place_of(scale.value)
        codes, levels = self._looked_up(made[data.name], name)
        return codes, place_of(scale.value), levels

    def _looked_up(self, operation: Any, name: str) -> tuple[Place, Place]:
        """Where codes and levels lie."""
        if operation.type != _LOOKED_UP or "vector_axis" in operation.inputs:
            raise ValueError(f"{name} is looked up by {operation.type}, or as vectors")
        codes, levels = (operation.inputs[key].arguments[0].value for key in ("indices", "lut"))
        return place_of(codes), place_of(levels)

    def _unpacked(
        self, places: tuple[Place, ...], weight: Weight, grid: str | None
    ) -> Quantized | Float32:
        first = _as_shape(self._blobs.array(places[0]), weight.shape, weight.name)
        if grid is None:
            wanted = "<f2" if weight.is_matrix else self._vectors
            if first.dtype != wanted:
                raise ValueError(f"{weight.name} is {first.dtype}, not {wanted}")
            return first.astype(np.float32)
        bits = TYPES[places[0].kind].bits
        if grid in PALETTE_GRIDS:
            return self._of_palette(weight, PALETTE_GRIDS[grid], first, bits, places[1])
        return self._on_grid(weight, GRIDS[grid], first, places)

    def _of_palette(
        self, weight: Weight, grid: PaletteGrid, codes: npt.NDArray[Any], bits: int, place: Place
    ) -> PaletteTensor:
        shape = (len(codes) // grid.group, grid.size)
        if bits != grid.bits:
            raise ValueError(f"{weight.name} has codes of {bits} bits")
        levels = _as_shape(self._blobs.array(place), shape, weight.name).astype(np.float32)
        return PaletteTensor(grid, np.ascontiguousarray(codes.view(np.int8)), levels)

    def _on_grid(
        self, weight: Weight, grid: Grid, codes: npt.NDArray[Any], places: tuple[Place, ...]
    ) -> QuantizedTensor:
        if TYPES[places[0].kind].bits != grid.bits:
            raise ValueError(f"{weight.name} has codes of type {places[0].kind}")
        wanted = (len(codes), grid.groups(codes.shape[1]))
        if grid.asymmetric:
            if {places[0].kind, places[2].kind} != {"UINT4"}:
                raise ValueError(f"{weight.name} has codes or zero points of another type")
            offset = _as_shape(self._blobs.array(places[2]), wanted, weight.name)
            groups = codes.reshape(*wanted, -1).view(np.int8) - offset.view(np.int8)[:, :, None]
            codes = groups.reshape(codes.shape)
        elif len(places) == 3:
            levels = grid.levels or range(grid.low, grid.high + 1)
            found = self._blobs.array(places[2])
            wrong = found.ravel() != np.array(levels, np.float32)
            if places[2].shape != (len(levels),) or wrong.any():
                raise ValueError(f"{weight.name} has other levels than {grid.name}")
            codes = codes.astype(np.int8) + np.int8(grid.low)
        elif grid.levels is not None or places[0].kind not in ("INT4", "INT8"):
            raise ValueError(f"{weight.name} has no levels")
        scale = _as_shape(self._blobs.array(places[1]), wanted, weight.name).astype(np.float32)
        if codes.min() < grid.low or codes.max() > grid.high or not _valid(scale, grid):
            raise ValueError(f"{weight.name} has a code or a scale that {grid.name} does not have")
        return QuantizedTensor(grid, np.ascontiguousarray(codes), scale)

    def factors(self, function: str) -> dict[str, npt.NDArray[Any]]:
        """{name: numbers without sizes of 1} of the factors that the functions of an adapter have.

        Raises:
            BadInput: two functions have different ones.
        """
        with self._checked():
            found: list[dict[str, Place]] = [
                {
                    key: place_of(operation.attributes["val"])
                    for key, operation in made.items()
                    if operation.type == "const" and key.endswith(("_lora_a", "_lora_b"))
                }
                for name, made in zip(self._names, self._made, strict=True)
                if name.removeprefix("decode_").removeprefix("prefill_") == function
            ]
            first, *others = found or [{}]
            if any(other != first for other in others):
                raise ValueError(f"the functions of {function} have different factors")
            return {key: self._blobs.array(place) for key, place in first.items()}

    def orders(self, names: set[str]) -> dict[str, list[str]]:
        """{function: those of `names` that operations take, in the order in which they do}."""
        found = zip(self._names, self._blocks, strict=True)
        return {name: _order(block, names) for name, block in found}

    def require_tables(self, config: DecoderConfig) -> None:
        """Raise BadInput unless tables of ropes hold rotations, and empty biases zeros."""
        with self._checked():
            for made in self._made:
                for name, operation in made.items():
                    if operation.type == "const" and name.partition("_")[0] in ("rope", "zeros"):
                        self._require_table(name, operation.attributes["val"], config)

    def _require_table(self, name: str, value: Any, config: DecoderConfig) -> None:
        if value.WhichOneof("value") != "blobFileValue":
            return
        found = self._blobs.array(place_of(value))
        kind, index, *_ = name.split("_")
        wanted = np.zeros(found.shape, np.float32)
        if kind == "rope":
            rope, half = config.ropes[int(index)], name.endswith("sin")
            width = rope.rotated(config.head_dim) // 2
            if width > 1 and found.shape[-1:] != (width,):
                raise ValueError(f"{name} has shape {found.shape}")
            length = found.size // width
            wanted = turns(rope, config.head_dim, length)[half].reshape(found.shape)
        if not np.array_equal(found, wanted.astype(found.dtype)):
            raise ValueError(f"{name} has other numbers")

    @contextmanager
    def _checked(self, weight: str = "") -> Iterator[None]:
        """What a package that is not as it should be makes of its reader, as BadInput."""
        try:
            yield
        except BadInput:
            raise
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            why = str(error) or type(error).__name__
            raise _foreign(self.name, why if weight in why else f"{weight}: {why}") from error
        except DecodeError as error:
            raise _foreign(self.name, "its model is not a message of Core ML") from error


def read_back(
    files: Sequence[File], config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the packages, under its source name.

    Raises:
        BadInput: a weight or a table is missing or not as it should be.
    """
    require_program(files, config)
    for weight in weights(config):
        yield weight.name, unpack(files, weight, grids.get(weight.name))


def unpack(files: Sequence[File], weight: Weight, grid: str | None) -> Quantized | Float32:
    """One weight of the packages; in as many of them as it is, it must be the same.

    Raises:
        BadInput: as File.unpack, or packages have two of it.
    """
    holders = [file for file in files if file.has(weight.name)] or list(files[:1])
    first, *others = (file.unpack(weight, grid) for file in holders)
    for file, other in zip(holders[1:], others, strict=True):
        if isinstance(first, np.ndarray) or isinstance(other, np.ndarray):
            same = np.array_equal(first, other)  # type: ignore[arg-type]
        else:
            same = first.digest(weight.name) == other.digest(weight.name)
        if not same:
            raise _foreign(file.name, f"its {weight.name} is not that of {holders[0].name}")
    return first


def require_program(files: Sequence[File], config: DecoderConfig) -> None:
    """Raise BadInput unless functions read all weights, in the order of a forward pass.

    And unless tables hold what they are made of.
    """
    wanted = [_name(weight.name) for weight in weights(config)]
    orders = [file.orders(set(wanted)) for file in files]
    for file, order in zip(files, orders, strict=True):
        if order.keys() != orders[0].keys():
            raise _foreign(file.name, f"it has other functions than {files[0].name}")
    for function in orders[0]:
        found = list(dict.fromkeys(name for order in orders for name in order[function]))
        if found != wanted:
            pairs = zip([*found, "nothing"], [*wanted, "nothing"], strict=False)
            read, due = next(pair for pair in pairs if pair[0] != pair[1])
            raise _foreign(files[0].name, f"it computes with {read} in the place of {due}")
    for file in files:
        file.require_tables(config)


def _order(block: Any, names: set[str]) -> list[str]:
    """Those of `names` that operations take, in the order in which they are taken first.

    Of one operation a weight comes before its bias.
    """
    found: dict[str, None] = {}
    for operation in block.operations:
        if operation.type == "const" or operation.type.startswith("constexpr_"):
            continue
        for key in sorted(operation.inputs, reverse=True):
            for argument in operation.inputs[key].arguments:
                if argument.name in names:
                    found.setdefault(argument.name)
    return list(found)


def _as_shape(found: npt.NDArray[Any], shape: Sequence[int], name: str) -> npt.NDArray[Any]:
    """An array with the sizes of 1 that it has in the model."""
    if found.shape != tuple(size for size in shape if size != 1):
        raise ValueError(f"{name} has shape {found.shape}, not {tuple(shape)}")
    return found.reshape(shape)


def _valid(scale: Float32, grid: Grid) -> bool:
    return bool(np.isfinite(scale).all() and (grid.signed_scale or (scale > 0).all()))


def _name(source: str) -> str:
    return source.replace(".", "_")


def _foreign(package: str, why: str) -> BadInput:
    return BadInput(f"{package} is not a package that slimport wrote", why, "export it again")
