"""What one XNNPACK graph of a .pte file multiplies by, read as XNNPACK's delegate reads it.

Part of the reader, which shares no code with what writes the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .tools import XNNPACK, generated

MOST = 1_000_000  # nodes and values of all graphs together
MANY, FEW = 100_000, 64  # elements of a long vector; of a short one, such as a shape
LONGEST = 512  # bytes of a name
_HEADER = struct.Struct("<4x4sHIIIQ")
_FACTOR = re.compile(r"(.+\.lora_[ab]):[0-9a-f]{16}")
_INPUT, _OUTPUT = 1, 2  # flags of a value
_NONE, _NAMED = 2**32 - 1, 2**64 - 1  # no value; an offset that a name stands in for
_FP32 = 1  # an XNNDatatype, as those that follow
_CHANNEL, _TOKEN, _GROUP = 6, 9, 10
_TABLES = {
    **dict.fromkeys(("XNNAdd", "XNNMultiply"), "_XNNNode2x1"),
    "XNNConvert": "_XNNNode1x1",
}
_WEIGHTS = {  # (datatype, its quantization): bits of a code
    (_FP32, ""): 32,
    (_CHANNEL, "PerChannelQuant"): 8,
    (_GROUP, "PerChannelGroupQuant"): 4,
}


@dataclass(frozen=True, slots=True)
class Product:
    """x @ weight.T + bias, as one node is given it.

    Attributes:
        shape: of the weight, (outputs, inputs).
        bits: of a code, signed or raised by 8; 32: the weight is float32.
        group: inputs that share a scale; None: a scale for each output, or none.
        weight, scale, bias: keys of the file; None: there is none.
        source, made: values of the graph, x before it is rounded and what the node makes.
    """

    shape: tuple[int, int]
    bits: int
    group: int | None
    weight: str
    scale: str | None
    bias: str | None
    source: int = field(compare=False)
    made: int = field(compare=False)


class Operand(NamedTuple):
    """An input of the graph, by its place among them, and the operator that is given it."""

    kind: str
    place: int


@dataclass(frozen=True, slots=True)
class Graph:
    """What a graph takes.

    Attributes:
        inputs, outputs: how many of the values.
        uses: products by weights of the file, and inputs that are added or multiplied by, in the
            order in which they run.
    """

    inputs: int
    outputs: int
    uses: tuple[Product | Operand, ...]


class _Value(NamedTuple):
    id: int
    datatype: int
    dims: tuple[int, ...]
    constant: int
    external: int
    flags: int
    means: str
    quantization: Any


class _Values(dict[int, _Value]):
    def __missing__(self, id: int) -> _Value:
        raise ValueError(f"a node is given value {id}, which nothing makes")


def read_graph(
    payload: memoryview, sizes: Mapping[str, int], spend: Callable[[int], None]
) -> Graph:
    """The graph of a delegate.

    Args:
        sizes: {key: bytes} of what the file holds under names.
        spend: is told how many nodes, values and constants it has before they are read.

    Raises:
        ValueError, or what the generated classes raise: it is malformed, or multiplies by a weight
            in a way that is none of those of Product.
    """
    graph, numbers = _parts(payload)
    spend(graph.XnodesLength() + graph.XvaluesLength() + graph.ConstantDataLength())
    constants: list[str | None] = [None]  # the first stands for what is no constant
    left = len(numbers)
    for each in [*elements(graph, "ConstantData", MANY)][1:]:
        constants.append(_constant(each, sizes, numbers))
        left -= 0 if constants[-1] else each.Size()
        if left < 0:
            raise ValueError("its constants are larger than what it brings along")
    values = _Values()
    for each in elements(graph, "Xvalues", MANY):
        value = _value(each)
        if value.id in values:
            raise ValueError(f"value {value.id} stands twice")
        values[value.id] = value
    inputs = _external(values, _INPUT, 0)
    outputs = _external(values, _OUTPUT, len(inputs))
    sums: set[frozenset[int]] = set()
    places = {id: n for n, id in enumerate(inputs)}
    uses = tuple(_uses(graph, values, constants, places, sums))
    _require_updates([use for use in uses if isinstance(use, Product)], sums)
    return Graph(len(inputs), len(outputs), uses)


def factor_of(key: str) -> str | None:
    """The name of a factor of an update, of its key; None: it is the key of something else."""
    found = _FACTOR.fullmatch(key)
    return found and found[1]


def elements(table: Any, field: str, most: int) -> Iterator[Any]:
    """The elements of a vector; ValueError if there are more than `most`."""
    count = getattr(table, f"{field}Length")()
    if count > most:
        raise ValueError(f"it has {count} {field}")
    return (getattr(table, field)(index) for index in range(count))


def text(name: bytes | None) -> str:
    if name is None or len(name) > LONGEST:
        raise ValueError("a name is missing, or has too many bytes")
    return name.decode()


def member(schema: Any, union: str, number: int, table: Any) -> tuple[str, Any]:
    """The name of a union's member, and its table; None: it is of no kind that the reader reads."""
    for name, each in vars(getattr(schema, union)).items():
        if each == number and name != "NONE":
            reader = getattr(schema, _TABLES.get(name, name), None)
            if reader is None:
                return name, None
            found = reader()
            found.Init(table.Bytes, table.Pos)
            return name, found
    raise ValueError(f"{union} has no member {number}")


def _parts(payload: memoryview) -> tuple[Any, memoryview]:
    """The graph, and the numbers that it brings along."""
    magic, length, start, size, behind, nbytes = _HEADER.unpack_from(payload)
    content, numbers = payload[start : start + size], payload[behind : behind + nbytes]
    whole = (len(content), len(numbers)) == (size, nbytes)
    if magic != b"XH00" or length != _HEADER.size or not whole:
        raise ValueError("a delegate has no header of XNNPACK, or ends too early")
    graph = generated(XNNPACK).XNNGraph
    if not graph.XNNGraphBufferHasIdentifier(content, 0):
        raise ValueError("a delegate has no graph of XNNPACK")
    return graph.GetRootAs(content, 0), numbers


def _constant(constant: Any, sizes: Mapping[str, int], numbers: memoryview) -> str | None:
    """The key of a constant that lies in the file; None: what the mean of a norm multiplies by."""
    key, start, nbytes = constant.NamedKey(), constant.Offset(), constant.Size()
    if key is None:
        held = np.frombuffer(numbers[start : start + nbytes], "<f4")
        if held.nbytes != nbytes or not (held == np.float32(1 / (held.size or 1))).all():
            raise ValueError("a graph brings numbers along that are no mean")
        return None
    name = text(key)
    if start != _NAMED or nbytes != sizes.get(name):
        raise ValueError(f"{name} is not stored, or has not {nbytes} bytes")
    return name


def _value(value: Any) -> _Value:
    schema = generated(XNNPACK)
    kind, tensor = member(schema, "XValueUnion", value.XvalueUnionType(), value.XvalueUnion())
    means, quantization = "", None
    if kind == "XNNQuantizedTensorValue":
        given = tensor.QuantParamsType(), tensor.QuantParams()
        means, quantization = member(schema, "XNNQuantParams", *given)
        tensor = tensor.TensorValue()
    dims = tuple(elements(tensor, "Dims", FEW))
    if tensor.NumDims() != len(dims) or tensor.DqDatatype() or tensor.Flags() not in (0, 1, 2):
        raise ValueError(f"value {tensor.IdOut()} has {len(dims)} dimensions, or odd flags")
    return _Value(
        tensor.IdOut(),
        tensor.Datatype(),
        dims,
        tensor.ConstantBufferIdx(),
        tensor.ExternalId(),
        tensor.Flags(),
        means,
        quantization,
    )


def _external(values: Mapping[int, _Value], flag: int, first: int) -> list[int]:
    """Ids of the inputs or outputs, in the order in which a call gives them."""
    found = sorted((v for v in values.values() if v.flags == flag), key=lambda v: v.external)
    wanted = [*range(first, first + len(found))]
    if [value.external for value in found] != wanted or any(v.constant for v in found):
        raise ValueError("inputs and outputs are not numbered, or are constants")
    return [value.id for value in found]


def _uses(
    graph: Any,
    values: Mapping[int, _Value],
    constants: list[str | None],
    inputs: Mapping[int, int],
    sums: set[frozenset[int]],
) -> Iterator[Product | Operand]:
    """What the nodes use; pairs that are added go to `sums`."""
    schema, rounded = generated(XNNPACK), _Values()
    for node in elements(graph, "Xnodes", MANY):
        kind, given = member(schema, "XNodeUnion", node.XnodeUnionType(), node.XnodeUnion())
        if kind == "XNNConvert":
            rounded[given.OutputId()] = values[given.InputId()]
        elif kind in ("XNNAdd", "XNNMultiply"):
            ids = (given.Input1Id(), given.Input2Id())
            yield from (Operand(kind, inputs[id]) for id in ids if id in inputs)
            if kind == "XNNAdd":
                sums.add(frozenset(ids))
        elif kind == "XNNFullyConnected":
            key = constants[values[given.FilterId()].constant]
            if key is not None:
                if given.Flags() or node.OutputMinMax() is not None:
                    raise ValueError(f"the product with {key} is transposed or clamped")
                yield _product(given, key, values, constants, rounded)


def _require_updates(products: list[Product], sums: set[frozenset[int]]) -> None:
    """ValueError unless factors come in pairs, behind the product that their own is added to."""
    for place, first in enumerate(products):
        factor = factor_of(first.weight)
        if factor is None or factor.endswith("lora_b"):
            continue  # a b without an a before it is one too many: the reader counts them
        if not 0 < place < len(products) - 1:
            raise ValueError(f"{factor} stands alone")
        base, second = products[place - 1], products[place + 1]
        stem = factor.removesuffix(".lora_a")
        if (
            base.weight.rpartition(":")[0] not in (f"{stem}.codes", f"{stem}.weight")
            or factor_of(second.weight) != f"{stem}.lora_b"
            or (first.bits, first.bias, second.bits, second.bias) != (32, None, 32, None)
            or (first.source, second.source) != (base.source, first.made)
            or frozenset((base.made, second.made)) not in sums
        ):
            raise ValueError(f"{factor} is not a part of an update of {stem}")


def _product(
    node: Any,
    key: str,
    values: Mapping[int, _Value],
    constants: list[str | None],
    rounded: Mapping[int, _Value],
) -> Product:
    weight, x = values[node.FilterId()], values[node.Input1Id()]
    bits = _WEIGHTS.get((weight.datatype, weight.means), 0)
    place = bool(weight.constant), weight.external, weight.flags
    if not bits or len(weight.dims) != 2 or place != (True, _NONE, 0):
        raise ValueError(f"{key} is no matrix of the file: datatype {weight.datatype}")
    rows, columns = weight.dims
    scale = group = None
    source = x
    if bits != 32:
        _require_rounded(key, x)
        source = rounded[x.id]
        scale, group = _scale(key, weight, constants)
    if (source.datatype, source.means, source.constant) != (_FP32, "", 0):
        raise ValueError(f"{key} is not multiplied by float32 numbers")
    bias = _bias(key, node.BiasId(), rows, values, constants)
    given = ((rows, columns), bits, group, key, scale, bias)
    return Product(*given, source.id, node.OutputId())


def _require_rounded(key: str, x: _Value) -> None:
    """ValueError if a value is not 8 bits with a scale and zero point for each token."""
    if (x.datatype, x.means, x.constant) != (_TOKEN, "PerTokenDynamicQuant", 0):
        raise ValueError(f"{key} is multiplied by datatype {x.datatype}")
    if x.quantization.NumNonbatchDims() != 1:
        raise ValueError(f"{key}: tokens share a scale")


def _scale(key: str, weight: _Value, constants: list[str | None]) -> tuple[str, int | None]:
    """The key of the scales, and how many inputs share one."""
    means, (rows, columns) = weight.quantization, weight.dims
    group = means.GroupSize() if weight.datatype == _GROUP else None
    scales = rows
    if group is not None:
        if group < 1 or columns % group:
            raise ValueError(f"{key}: groups of {group} do not divide {columns} inputs")
        scales = rows * (columns // group)
    index = means.ScaleBufferIdx()
    found = constants[index] if index else None
    inside = means.ScaleIsNone() or means.ScaleLength()  # the runtime needs an empty vector
    if found is None or inside or means.ChannelDim() or means.NumScales() != scales:
        raise ValueError(f"{key} has not {scales} scales of the file, one for each output or group")
    return found, group


def _bias(
    key: str, id: int, rows: int, values: Mapping[int, _Value], constants: list[str | None]
) -> str | None:
    if id == _NONE:
        return None
    bias = values[id]
    found = constants[bias.constant] if bias.constant else None
    if found is None or (bias.datatype, bias.means, bias.dims) != (_FP32, "", (rows,)):
        raise ValueError(f"the bias of {key} is no float32 vector of {rows} numbers")
    return found
