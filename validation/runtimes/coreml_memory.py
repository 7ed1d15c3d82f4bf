"""Bytes that a package takes once it is loaded, as its program says."""

from __future__ import annotations

import math
from pathlib import Path

from ...export.coreml.package import package_of, properties_of
from ..runtime import Memory
from .mil_package import Package, type_of

_BYTES = {"FLOAT16": 2, "FLOAT32": 4, "INT32": 4, "BOOL": 1}
_LIVE = 4  # tensors of a layer at a time: the stream, what is read of it, and what is made of that


def memory(file: Path, part: int) -> Memory:
    """Memory of a package whose runs have `part` tokens at most.

    The weights are mapped, and copied to the GPU as they are. States are kept once. Activations
    are the logits of all tokens of a run, some tensors as wide as the widest, and the scores of a
    layer before and after the softmax. What Core ML takes for itself is not known.
    """
    package = Package.open(package_of(file))
    told = properties_of(file)
    heads, context = (int(told[f"slimport.{key}"]) for key in ("heads", "context_length"))
    function = package.model.mlProgram.functions[package.functions[0]]
    block = function.block_specializations[function.opset]
    states = (
        type_of(given.type.stateType.wrappedType.tensorType)
        for given in function.inputs
        if given.type.WhichOneof("type") == "stateType"
    )
    made = {
        output.name: type_of(output.type.tensorType)
        for operation in block.operations
        if operation.type != "const" and "state" not in operation.type
        for output in operation.outputs
    }
    sizes = {name: _nbytes(*each, part) for name, each in made.items() if None in each[1]}
    results = [sizes.pop(name) for name in block.outputs]
    weights = sum(path.stat().st_size for path in (file.parent / "weights").iterdir())
    return Memory(
        mapped=weights + file.stat().st_size,
        repacked=weights,
        kv_cache=sum(_nbytes(*state, 1) for state in states),
        compute=sum(results) + _LIVE * max(sizes.values()) + _scores(heads, part, context),
    )


def _nbytes(kind: str, shape: tuple[int | None, ...], tokens: int) -> int:
    """Of a tensor whose sizes that vary are `tokens`."""
    return _BYTES[kind] * math.prod(tokens if size is None else size for size in shape)


def _scores(heads: int, part: int, context: int) -> int:
    """Scores of one layer, before and after the softmax."""
    return 2 * _BYTES["FLOAT16"] * heads * part * context
