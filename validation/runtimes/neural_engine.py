"""What of a program Apple's Neural Engine does not run, by rules that others found on devices.

No rule can promise that it does: Core ML decides on the device, and says nothing when it decides
otherwise. Each rule names its source; docs/coreml.md has them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...targets.limits import Finding, Level
from .mil_package import KINDS, Package, Type, malformed, type_of

_GUIDE = "coremltools guide, "
_PRODUCTS = ("conv", "linear", "matmul")
_RUN = frozenset(
    """conv linear matmul softmax layer_norm add sub mul real_div maximum minimum silu gelu tanh
    sigmoid relu exp sqrt rsqrt square concat split slice_by_index slice_update reshape transpose
    expand_dims squeeze identity read_state write_state reduce_mean reduce_sum reduce_max cast
    """.split()
)
_ELSEWHERE = {
    "scaled_dot_product_attention": "pytorch/executorch#16057: wrong numbers on iOS 26",
    "gather": "apple/coremltools#1103: look-ups run on the CPU",
    "pow": "SqueezeBits, disaggregated inference: pow leaves the Neural Engine",
    "select": "reports of apps: shapes of a choice that broadcasts are not found",
}
_LONGEST, _CHANNELS = 16_384, 65_536
_PACKAGE, _TOO_LARGE = 900_000_000, 1_400_000_000
_LAYERS = 24


@dataclass(frozen=True, slots=True)
class Inspection:
    """What rules say of packages.

    Attributes:
        operations, run: of layers and head; and of these, those that no rule keeps away: neither
            themselves, nor their function or package.
        weight_bytes, run_bytes: bytes of the constants that they read, likewise.
        findings: with the name of the operation each.
    """

    operations: int
    run: int
    weight_bytes: int
    run_bytes: int
    findings: tuple[Finding, ...]


def inspect(packages: Sequence[Path]) -> Inspection:
    """Look at every function of packages.

    What only depends on ids and positions runs before the first layer, on the CPU: look-ups of
    rows, and masks. It is not counted.

    Raises:
        BadInput, ValidationFailed: a package cannot be read.
    """
    counts, findings = Counter[str](), list[Finding]()
    for path in packages:
        package = Package.open(path)
        try:
            findings += _inspected(package, path.name, counts)
        except (LookupError, ValueError, RecursionError) as error:
            raise malformed(f"{path.name}: {type(error).__name__} {error}") from error
    if not counts["bytes"]:
        raise malformed("nothing in it is multiplied by a weight")
    return Inspection(
        counts["operations"],
        counts["run"],
        counts["bytes"],
        counts["run_bytes"],
        tuple(dict.fromkeys(findings)),
    )


def _inspected(package: Package, name: str, counts: Counter[str]) -> Iterator[Finding]:
    """Findings on a package; what it has is added to `counts`."""
    of_package = list(_of_package(package, name))
    yield from of_package
    for each in package.functions:
        function = _Function(package, f"{name} {each}")
        of_states = list(function.of_states())
        yield from of_states
        away = _refused([*of_package, *of_states])
        for operation in function.body:
            found = list(function.broken(operation))
            yield from found
            size = function.weight_bytes(operation)
            counts["operations"] += 1
            counts["bytes"] += size
            if not away and not _refused(found):
                counts["run"] += 1
                counts["run_bytes"] += size


def _refused(findings: Iterable[Finding]) -> bool:
    return any(each.level == "refused" for each in findings)


class _Function:
    """A function, its operations told apart."""

    def __init__(self, package: Package, name: str) -> None:
        _, _, function = name.partition(" ")
        message = package.model.mlProgram.functions[function]
        self.name, self._inputs = name, message.inputs
        self._operations = message.block_specializations[message.opset].operations
        self._made = {o.name: each for each in self._operations for o in each.outputs}
        self.body = list(self._body())

    def _body(self) -> Iterator[Any]:
        """Operations that depend on a product, and products; through states too."""
        after: set[str] = {given.name for given in self._inputs if given.name == "hidden"}
        for operation in self._operations:
            if operation.type == "const" or operation.type.startswith("constexpr_"):
                continue
            taken = {a.name for each in operation.inputs.values() for a in each.arguments}
            if operation.type in _PRODUCTS or taken & after:
                after |= {output.name for output in operation.outputs}
                if operation.type == "write_state":
                    after |= {a.name for a in operation.inputs["input"].arguments}
                yield operation

    def weight_bytes(self, operation: Any) -> int:
        """Bytes in the weight file of the constants that an operation is given directly."""
        return sum(
            sum(_stored(self._made, a.name))
            for each in operation.inputs.values()
            for a in each.arguments
            if a.name in self._made
        )

    def broken(self, operation: Any) -> Iterator[Finding]:
        """Findings on one operation of the body."""
        if operation.type not in _RUN:
            source = _ELSEWHERE.get(operation.type, "not among those that are known to run")
            yield self._finding("refused", operation, "does not run there", source)
        for output in operation.outputs:
            kind, shape = type_of(output.type.tensorType)
            yield from self._of_type(operation, kind, shape)
        for each in operation.inputs.values():
            for argument in each.arguments:
                made = self._made.get(argument.name)
                if made is not None and made.type.startswith("constexpr_"):
                    yield from self._of_weight(made)

    def _of_type(
        self, operation: Any, kind: str, shape: tuple[int | None, ...]
    ) -> Iterator[Finding]:
        if None in shape:
            source = "Apple developer forums 724930: only the default shape runs there"
            yield self._finding("refused", operation, "has a size that is not fixed", source)
        if kind not in ("FLOAT16", "BOOL"):
            source = "apple/coremltools#2585: it computes in float16 alone"
            yield self._finding("refused", operation, f"is {kind}", source)
        if len(shape) > 4 and operation.type in ("matmul", "mul", "add"):
            source = "reports of apps: 5-D products run on the CPU"
            yield self._finding("refused", operation, f"has {len(shape)} dimensions", source)
        sizes = [size or 1 for size in shape]
        wide = max(sizes[2:], default=1) > _LONGEST or max(sizes, default=1) > _CHANNELS
        if wide and operation.type in _PRODUCTS:
            source = "ane-guide, sweep on M1: 65,536 channels, 16,384 along others"
            words = f"makes {' x '.join(map(str, sizes))}, more than older chips take"
            yield self._finding("warning", operation, words, source)

    def _of_weight(self, made: Any) -> Iterator[Finding]:
        """Findings on how a weight is compressed."""
        given = {key: each.arguments[0] for key, each in made.inputs.items()}
        types = {key: self._type_of(argument) for key, argument in given.items()}
        if any(map(self._decompressed, given.values())):
            source = "apple/coremltools#2688: the load ends the app"
            yield self._finding("refused", made, "is a look-up table times scales", source)
            return
        if made.type == "constexpr_blockwise_shift_scale":
            if math.prod(size or 1 for size in types["scale"].shape[1:]) > 1:
                source = "apple/coreai-models#279: wrong numbers; it takes scales of rows"
                yield self._finding("refused", made, "has several scales in a row", source)
        if made.type == "constexpr_lut_to_dense":
            kind, shape = types["lut"]
            if kind != "FLOAT16":
                source = "reports of apps: tables of integers leave the Neural Engine"
                yield self._finding("refused", made, f"has a table of {kind}", source)
            if math.prod(size or 1 for size in shape[1:-2]) > 1:
                source = f"{_GUIDE}palettization performance: tables for groups of channels alone"
                yield self._finding("refused", made, "has tables along its columns", source)

    def _type_of(self, argument: Any) -> Type:
        if argument.WhichOneof("binding") == "value":
            return type_of(argument.value.type.tensorType)
        return type_of(self._made[argument.name].outputs[0].type.tensorType)

    def _decompressed(self, argument: Any) -> bool:
        """Whether an argument is a constant that the device makes of constants."""
        if argument.WhichOneof("binding") == "value":
            return False
        made: str = self._made[argument.name].type
        return made.startswith("constexpr_")

    def of_states(self) -> Iterator[Finding]:
        """Findings on states."""
        states = {
            given.name: type_of(given.type.stateType.wrappedType.tensorType)[1]
            for given in self._inputs
            if given.type.WhichOneof("type") == "stateType"
        }
        if len(states) > 2:
            words = f"{self.name} has {len(states)} states"
            yield Finding("refused", words, "reports of apps: 3 and more fail when they run")
        for name, shape in states.items():
            sizes = [size or 0 for size in shape]
            if len(sizes) != 4 or sizes[-1] % 32 or not all(map(_power_of_two, sizes[1:])):
                words = f"{self.name}: the state {name} is {' x '.join(map(str, sizes))}"
                source = "apple/coremltools#2631: its last size is a multiple of 32; SqueezeBits:"
                yield Finding("refused", words, f"{source} powers of two, but for the first")

    def _finding(self, level: Level, operation: Any, words: str, source: str) -> Finding:
        name = operation.outputs[0].name if operation.outputs else operation.type
        return Finding(level, f"{self.name}: {operation.type} {name} {words}", source)


def _stored(made: dict[str, Any], name: str) -> Iterator[int]:
    """Bytes in the weight file of a constant."""
    operation = made[name]
    values = [operation.attributes["val"]] if operation.type == "const" else []
    if operation.type.startswith("constexpr_"):
        for each in operation.inputs.values():
            argument = each.arguments[0]
            if argument.WhichOneof("binding") == "value":
                values.append(argument.value)
            else:
                yield from _stored(made, argument.name)
    for value in values:
        if value.WhichOneof("value") == "blobFileValue":
            kind, shape = type_of(value.type.tensorType)
            yield -(-KINDS[kind].bits * math.prod(size or 1 for size in shape) // 8)


def _power_of_two(size: int) -> bool:
    return size > 0 and not size & (size - 1)


def _of_package(package: Package, name: str) -> Iterator[Finding]:
    size = sum(path.stat().st_size for path in package.folder.glob("weights/*"))
    if size > _PACKAGE:
        level: Level = "refused" if size > _TOO_LARGE else "warning"
        words = f"{name} has {size / 1e9:.2f} GB of weights: it may fall to the GPU, or be killed"
        yield Finding(level, words, "reports of apps: 0.9 GB are safe on a phone, 1.4 GB are not")
    function = package.model.mlProgram.functions[package.functions[0]]
    operations = function.block_specializations[function.opset].operations
    layers = sum(operation.type == "softmax" for operation in operations)
    if layers > _LAYERS:
        words = f"{name} has {layers} layers: some chips end at 32"
        yield Finding("warning", words, "ANEForge: 24 are safe in one program")
