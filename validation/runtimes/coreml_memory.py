"""Bytes that packages take once they are loaded, as their programs say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...export.coreml.package import bundle_of, packages_in, properties_of
from ...export.coreml_ane.layout import room_of
from ..runtime import Memory
from .mil_package import Package, type_of

_HALF = 2  # bytes of a float16
_PRODUCTS = ("linear", "conv")
_LIVE = 4  # tensors of a layer at a time: the stream, what is read of it, and what is made of that


def memory(file: Path, part: int) -> Memory:
    """Memory of packages whose runs have `part` tokens at most, if they may have any number.

    The weights are mapped, and copied to the GPU or the Neural Engine as they are. States are kept
    once. Activations are the logits of all tokens of a run, some tensors as wide as the widest, and
    the scores of a layer before and after the softmax. What Core ML takes for itself is not known.
    """
    told = properties_of(file)
    heads, context, vocabulary = (
        int(told.get(f"slimport.{key}", 0)) for key in ("heads", "context_length", "vocab_size")
    )
    part = min(part, context)
    if "slimport.chunk" in told:  # of fixed shapes
        part, context = int(told["slimport.chunk"]), room_of(context)
    packages = [Package.open(bundle_of(file) / name) for name in packages_in(bundle_of(file))]
    weights = sum(map(_weights, packages))
    programs = sum((package.folder / file.name).stat().st_size for package in packages)
    width = vocabulary + _LIVE * max(map(_widest, packages)) + 2 * heads * context
    return Memory(
        mapped=weights + programs,
        repacked=weights,
        kv_cache=sum(map(_states, packages)),
        compute=_HALF * part * width,
    )


def _weights(package: Package) -> int:
    return sum(path.stat().st_size for path in (package.folder / "weights").iterdir())


def _states(package: Package) -> int:
    """Of one function: all others use the same."""
    shapes = [
        type_of(given.type.stateType.wrappedType.tensorType)[1]
        for given in _function(package).inputs
        if given.type.WhichOneof("type") == "stateType"
    ]
    return sum(_HALF * math.prod(size or 1 for size in shape) for shape in shapes)


def _widest(package: Package) -> int:
    """Numbers that the widest product makes of a token, but for the logits."""
    function = _function(package)
    operations = function.block_specializations[function.opset].operations
    made = [each.outputs[0].type.tensorType for each in operations if each.type in _PRODUCTS]
    return max((max(size or 1 for size in type_of(kind)[1]) for kind in made[:-1]), default=0)


def _function(package: Package) -> Any:
    """The default one."""
    return package.model.mlProgram.functions[package.functions[0]]
