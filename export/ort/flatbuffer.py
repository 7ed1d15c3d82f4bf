"""Files of the ORT format as plain values, and back, always in the same order.

The schema is onnxruntime's ort.fbs. A table is {field: value}, a vector a list. ONNX Runtime writes
what has no order as its hash tables have it, with addresses of the process; `encode` sorts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

IDENTIFIER = b"ORTM"
ROOT = "InferenceSession"
Values = dict[str, Any]

_SCALARS = {
    "int8": number_types.Int8Flags,
    "uint8": number_types.Uint8Flags,
    "int32": number_types.Int32Flags,
    "uint32": number_types.Uint32Flags,
    "int64": number_types.Int64Flags,
    "float32": number_types.Float32Flags,
}
_EDGE = 12  # a struct, as bytes: node_index, src_arg_index, dst_arg_index
# {table: {slot: (field, kind)}}. [kind] is a vector, {kind} one whose order means nothing.
_TABLES: dict[str, dict[int, tuple[str, str]]] = {
    "InferenceSession": {
        0: ("ort_version", "string"),
        1: ("model", "Model"),
        3: ("kernel_type_str_resolver", "KernelTypeStrResolver"),
    },
    "Model": {
        0: ("ir_version", "int64"),
        1: ("opset_import", "{OperatorSetId}"),
        2: ("producer_name", "string"),
        3: ("producer_version", "string"),
        4: ("domain", "string"),
        5: ("model_version", "int64"),
        6: ("doc_string", "string"),
        7: ("graph", "Graph"),
        8: ("graph_doc_string", "string"),
        9: ("metadata_props", "{StringStringEntry}"),
    },
    "OperatorSetId": {0: ("domain", "string"), 1: ("version", "int64")},
    "StringStringEntry": {0: ("key", "string"), 1: ("value", "string")},
    "Graph": {
        0: ("initializers", "{Tensor}"),
        1: ("node_args", "{ValueInfo}"),
        2: ("nodes", "[Node]"),
        3: ("max_node_index", "uint32"),
        4: ("node_edges", "{NodeEdge}"),
        5: ("inputs", "[string]"),
        6: ("outputs", "[string]"),
        7: ("sparse_initializers", "{SparseTensor}"),
    },
    "SparseTensor": {},
    "Tensor": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("dims", "[int64]"),
        3: ("data_type", "int32"),
        4: ("raw_data", "bytes"),
    },
    "ValueInfo": {0: ("name", "string"), 1: ("doc_string", "string"), 2: ("type", "TypeInfo")},
    # A union in the schema; only tensors occur here.
    "TypeInfo": {
        0: ("denotation", "string"),
        1: ("value_type", "uint8"),
        2: ("value", "TensorTypeAndShape"),
    },
    "TensorTypeAndShape": {0: ("elem_type", "int32"), 1: ("shape", "Shape")},
    "Shape": {0: ("dim", "[Dimension]")},
    "Dimension": {0: ("value", "DimensionValue"), 1: ("denotation", "string")},
    "DimensionValue": {
        0: ("dim_type", "int8"),
        1: ("dim_value", "int64"),
        2: ("dim_param", "string"),
    },
    "Node": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("domain", "string"),
        3: ("since_version", "int32"),
        4: ("index", "uint32"),
        5: ("op_type", "string"),
        6: ("type", "int32"),
        7: ("execution_provider_type", "string"),
        8: ("inputs", "[string]"),
        9: ("outputs", "[string]"),
        10: ("attributes", "{Attribute}"),
        11: ("input_arg_counts", "[int32]"),
        12: ("implicit_inputs", "[string]"),
    },
    "Attribute": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("type", "int32"),
        3: ("f", "float32"),
        4: ("i", "int64"),
        5: ("s", "string"),
        8: ("floats", "[float32]"),
        9: ("ints", "[int64]"),
        10: ("strings", "[string]"),
    },
    "NodeEdge": {
        0: ("node_index", "uint32"),
        1: ("input_edges", "{edge}"),
        2: ("output_edges", "{edge}"),
    },
    "KernelTypeStrResolver": {0: ("op_kernel_type_str_args", "{OpIdKernelTypeStrArgsEntry}")},
    "OpIdKernelTypeStrArgsEntry": {
        0: ("op_id", "string"),
        1: ("kernel_type_str_args", "{KernelTypeStrArgsEntry}"),
    },
    "KernelTypeStrArgsEntry": {
        0: ("kernel_type_str", "string"),
        1: ("args", "[ArgTypeAndIndex]"),
    },
    "ArgTypeAndIndex": {0: ("arg_type", "int8"), 1: ("index", "uint32")},
}
_RAW_DATA = 4  # slot of a Tensor


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of a tensor that lie behind the tables.

    Attributes:
        offset: from the end of what `encode` gives; the 4 bytes before it hold `nbytes`.
    """

    offset: int
    nbytes: int


def decode(content: bytes) -> Values:
    """Every field of a file that ONNX Runtime wrote.

    Raises:
        ValueError: a field that this schema does not name, so that none is ever dropped.
    """
    if content[4:8] != IDENTIFIER:
        raise ValueError("no file of the ORT format")
    start = number_types.UOffsetTFlags.packer_type.unpack_from(content)[0]
    return _read_table(Table(content, start), ROOT)


def encode(session: Values, alignment: int) -> bytes:
    """The file up to its blobs, filled up to `alignment`; equal values give equal bytes."""
    writer = _Writer()
    writer.builder.Finish(writer.table(ROOT, session), IDENTIFIER)
    head = bytearray(writer.builder.Output())
    size = len(head)
    head += bytes(-size % alignment)
    for place, blob in writer.blobs:
        table = Table(head, size - place)
        field = table.Pos + table.Offset(_offset(_RAW_DATA))
        vector = len(head) + blob.offset - number_types.UOffsetTFlags.bytewidth
        number_types.UOffsetTFlags.packer_type.pack_into(head, field, vector - field)
    return bytes(head)


def _offset(slot: int) -> int:
    """Of a field's entry in the vtable, behind two sizes."""
    return 4 + 2 * slot


def _read_table(table: Table, name: str) -> Values:
    vtable = table.Pos - table.Get(number_types.SOffsetTFlags, table.Pos)
    size = table.Get(number_types.VOffsetTFlags, vtable)
    values: Values = {}
    for slot in range((size - _offset(0)) // 2):
        offset = table.Offset(_offset(slot))
        if not offset:
            continue
        if slot not in _TABLES[name]:
            raise ValueError(f"{name} has a field {slot} that is not known")
        field, kind = _TABLES[name][slot]
        values[field] = _read(table, offset, kind)
    return values


def _read(table: Table, offset: int, kind: str) -> Any:
    place = table.Pos + offset
    if kind in _SCALARS:
        return table.Get(_SCALARS[kind], place)
    if kind == "string":
        return table.String(place)
    if kind in _TABLES:
        return _read_table(Table(table.Bytes, table.Indirect(place)), kind)
    start, count = table.Vector(offset), table.VectorLen(offset)
    if kind == "bytes":
        return bytes(table.Bytes[start : start + count])
    element = kind[1:-1]
    if element in _SCALARS:
        flags = _SCALARS[element]
        return [table.Get(flags, start + i * flags.bytewidth) for i in range(count)]
    if element == "edge":
        edges = range(start, start + _EDGE * count, _EDGE)
        return [bytes(table.Bytes[edge : edge + _EDGE]) for edge in edges]
    places = range(start, start + 4 * count, 4)
    if element == "string":
        return [table.String(each) for each in places]
    return [_read_table(Table(table.Bytes, table.Indirect(each)), element) for each in places]


class _Writer:
    """A builder, which grows downwards: what a table points to is written before it.

    Attributes:
        blobs: the tables (as the builder counts, from the end) whose data is a blob.
    """

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1 << 20)
        self.blobs: list[tuple[int, Blob]] = []
        self._hole = int(self.builder.CreateByteVector(b""))

    def table(self, name: str, values: Values) -> int:
        fields = [
            (slot, kind, values[field])
            for slot, (field, kind) in _TABLES[name].items()
            if field in values
        ]
        pointed = {
            slot: self._pointed(kind, value) for slot, kind, value in fields if kind not in _SCALARS
        }
        self.builder.StartObject(1 + max(_TABLES[name]))
        for slot, kind, value in fields:
            if kind in _SCALARS:
                self.builder.PrependSlot(_SCALARS[kind], slot, value, 0)
            else:
                self.builder.PrependUOffsetTRelativeSlot(slot, pointed[slot], 0)
        place = int(self.builder.EndObject())
        self.blobs += [(place, value) for _, _, value in fields if isinstance(value, Blob)]
        return place

    def _pointed(self, kind: str, value: Any) -> int:
        """Where a value lies that a field points to."""
        if isinstance(value, Blob):
            return self._hole
        if kind in _TABLES:
            return self.table(kind, value)
        if kind == "string":
            return int(self.builder.CreateSharedString(value))
        if kind == "bytes":
            return int(self.builder.CreateByteVector(value))
        ordered = sorted(value, key=repr) if kind.startswith("{") else value
        return self._vector(kind[1:-1], ordered)

    def _vector(self, kind: str, values: list[Any]) -> int:
        if kind in _SCALARS:
            size = _SCALARS[kind].bytewidth
        elif kind == "edge":
            size = _EDGE
        else:
            size, values = 4, [self._pointed(kind, value) for value in values]
        self.builder.StartVector(size, len(values), min(size, 8) if kind in _SCALARS else 4)
        for value in reversed(values):
            if kind in _SCALARS:
                self.builder.Prepend(_SCALARS[kind], value)
            elif kind == "edge":
                self.builder.Pad(_EDGE)
                head = self.builder.Head()
                self.builder.Bytes[head : head + _EDGE] = value
            else:
                self.builder.PrependUOffsetTRelative(value)
        return int(self.builder.EndVector())
