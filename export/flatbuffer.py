"""Flatbuffers as plain values, and back, always in the same order.

A table is {field: value}, a vector a list, a member of a union (its name, its table), a struct its
bytes. What a table leaves out is missing, or its default: 0, where the schema names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

Values = dict[str, Any]

_SCALARS = {
    "bool": number_types.BoolFlags,
    "int8": number_types.Int8Flags,
    "uint8": number_types.Uint8Flags,
    "int16": number_types.Int16Flags,
    "int32": number_types.Int32Flags,
    "uint32": number_types.Uint32Flags,
    "int64": number_types.Int64Flags,
    "uint64": number_types.Uint64Flags,
    "float32": number_types.Float32Flags,
    "float64": number_types.Float64Flags,
}


@dataclass(frozen=True, slots=True)
class Schema:
    """What the bytes of a file mean.

    Attributes:
        tables: {table: {slot: (field, kind)}}. A kind is a scalar, "string", "bytes", a table, a
            struct or a union; [kind] is a vector, {kind} one whose order means nothing, which is
            sorted. A union stands at the slot of its value; the one before holds its type.
        structs: {struct: bytes}.
        unions: {union: {member: its table}}, in the order of their types.
        defaults: {table: {field: what it is where it is left out}}, where that is not 0.
    """

    identifier: bytes
    root: str
    tables: Mapping[str, Mapping[int, tuple[str, str]]]
    structs: Mapping[str, int] = field(default_factory=dict)
    unions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of a field that lie behind the tables.

    Attributes:
        offset: from the end of what `encode` gives; the 4 bytes before it hold `nbytes`.
    """

    offset: int
    nbytes: int


def decode(schema: Schema, content: bytes) -> Values:
    """Every field of a file that another program wrote.

    Raises:
        ValueError: a field that the schema does not name, so that none is ever dropped.
    """
    if content[4:8] != schema.identifier:
        raise ValueError(f"no file of the format {schema.identifier.decode()}")
    start = number_types.UOffsetTFlags.packer_type.unpack_from(content)[0]
    return _Reader(schema).table(Table(content, start), schema.root)


def encode(schema: Schema, values: Values, alignment: int = 1) -> bytes:
    """The file up to its blobs, filled up to `alignment`; equal values give equal bytes."""
    writer = _Writer(schema)
    writer.builder.Finish(writer.table(schema.root, values), schema.identifier)
    head = bytearray(writer.builder.Output())
    size = len(head)
    head += bytes(-size % alignment)
    for place, slot, blob in writer.blobs:
        table = Table(head, size - place)
        where = table.Pos + table.Offset(_offset(slot))
        vector = len(head) + blob.offset - number_types.UOffsetTFlags.bytewidth
        number_types.UOffsetTFlags.packer_type.pack_into(head, where, vector - where)
    return bytes(head)


def _offset(slot: int) -> int:
    """Of a field's entry in the vtable, behind two sizes."""
    return 4 + 2 * slot


class _Reader:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def table(self, table: Table, name: str) -> Values:
        vtable = table.Pos - table.Get(number_types.SOffsetTFlags, table.Pos)
        size = table.Get(number_types.VOffsetTFlags, vtable)
        values: Values = {}
        slots, unions = self.schema.tables[name], self.schema.unions
        types = {slot - 1 for slot, (_, kind) in slots.items() if kind in unions}
        for slot in range((size - _offset(0)) // 2):
            offset = table.Offset(_offset(slot))
            if not offset or slot in types:
                continue
            if slot not in slots:
                raise ValueError(f"{name} has a field {slot} that is not known")
            field, kind = slots[slot]
            if kind in unions:
                values[field] = self._member(table, slot, kind)
            else:
                values[field] = self._field(table, offset, kind)
        return values

    def _member(self, table: Table, slot: int, kind: str) -> tuple[str, Values]:
        """Of a union: its name, and its table."""
        members = list(self.schema.unions[kind].items())
        place = table.Offset(_offset(slot - 1))
        number = table.Get(_SCALARS["uint8"], table.Pos + place) if place else 0
        if not 0 < number <= len(members) or members[number - 1][1] not in self.schema.tables:
            raise ValueError(f"{kind} has a member {number} that is not known")
        member, name = members[number - 1]
        where = table.Indirect(table.Pos + table.Offset(_offset(slot)))
        return member, self.table(Table(table.Bytes, where), name)

    def _field(self, table: Table, offset: int, kind: str) -> Any:
        place = table.Pos + offset
        if kind in _SCALARS:
            return table.Get(_SCALARS[kind], place)
        if kind == "string":
            return table.String(place).decode()
        if kind in self.schema.tables:
            return self.table(Table(table.Bytes, table.Indirect(place)), kind)
        start, count = table.Vector(offset), table.VectorLen(offset)
        if kind == "bytes":
            return bytes(table.Bytes[start : start + count])
        element = kind[1:-1]
        if element in _SCALARS:
            flags = _SCALARS[element]
            return [table.Get(flags, start + i * flags.bytewidth) for i in range(count)]
        if element in self.schema.structs:
            size = self.schema.structs[element]
            places = range(start, start + size * count, size)
            return [bytes(table.Bytes[each : each + size]) for each in places]
        places = range(start, start + 4 * count, 4)
        if element == "string":
            return [table.String(each).decode() for each in places]
        return [self.table(Table(table.Bytes, table.Indirect(each)), element) for each in places]


class _Writer:
    """A builder, which grows downwards: what a table points to is written before it.

    Attributes:
        blobs: the tables (as the builder counts, from the end) and slots whose bytes are a blob.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.builder = flatbuffers.Builder(1 << 16)
        self.blobs: list[tuple[int, int, Blob]] = []
        self._hole = int(self.builder.CreateByteVector(b""))

    def table(self, name: str, values: Values) -> int:
        slots = self.schema.tables[name]
        fields = {
            slot: (kind, values[field]) for slot, (field, kind) in slots.items() if field in values
        }
        if len(fields) != len(values):
            raise ValueError(
                f"{name} has no {values.keys() - {field for field, _ in slots.values()}}"
            )
        pointed = {
            slot: self._pointed(kind, value)
            for slot, (kind, value) in fields.items()
            if kind not in _SCALARS
        }
        defaults = self.schema.defaults.get(name, {})
        self.builder.StartObject(1 + max(slots, default=-1))
        for slot, (kind, value) in fields.items():
            if kind in _SCALARS:
                default = defaults.get(slots[slot][0], 0)
                self.builder.PrependSlot(_SCALARS[kind], slot, value, default)
                continue
            if kind in self.schema.unions:
                number = 1 + list(self.schema.unions[kind]).index(value[0])
                self.builder.PrependSlot(_SCALARS["uint8"], slot - 1, number, 0)
            self.builder.PrependUOffsetTRelativeSlot(slot, pointed[slot], 0)
        place = int(self.builder.EndObject())
        self.blobs += [
            (place, slot, value) for slot, (_, value) in fields.items() if isinstance(value, Blob)
        ]
        return place

    def _pointed(self, kind: str, value: Any) -> int:
        """Where a value lies that a field points to."""
        if isinstance(value, Blob):
            return self._hole
        if kind in self.schema.unions:
            member, table = value
            return self.table(self.schema.unions[kind][member], table)
        if kind in self.schema.tables:
            return self.table(kind, value)
        if kind == "string":
            return int(self.builder.CreateSharedString(value))
        if kind == "bytes":
            return int(self.builder.CreateByteVector(value))
        ordered = sorted(value, key=repr) if kind.startswith("{") else value
        return self._vector(kind[1:-1], ordered)

    def _vector(self, kind: str, values: list[Any]) -> int:
        structs = self.schema.structs
        if kind in _SCALARS:
            size = _SCALARS[kind].bytewidth
        elif kind in structs:
            size = structs[kind]
        else:
            size, values = 4, [self._pointed(kind, value) for value in values]
        self.builder.StartVector(size, len(values), min(size, 8) if kind in _SCALARS else 4)
        for value in reversed(values):
            if kind in _SCALARS:
                self.builder.Prepend(_SCALARS[kind], value)
            elif kind in structs:
                self.builder.Pad(size)
                head = self.builder.Head()
                self.builder.Bytes[head : head + size] = value
            else:
                self.builder.PrependUOffsetTRelative(value)
        return int(self.builder.EndVector())
