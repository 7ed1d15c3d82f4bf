"""A .pte file as values: its methods, the graphs that they hand to XNNPACK, and its data."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ValidationFailed
from ...export import flatbuffer
from ...export.executorch import schema
from ...export.flatbuffer import Values

# magic, its size; the flatbuffer's (and what is before it); where segments begin, and their size
_PROGRAM, _WEIGHTS = struct.Struct("<4sIQQQ"), struct.Struct("<4sIQQQQ")
_START = 8  # behind the root's place and the identifier
_GRAPH = struct.Struct("<4x4sHIIIQ")  # magic, its size, flatbuffer and its size, constants and size
ROUNDED = "PerTokenDynamicQuant"  # what activations are, beside codes


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix (rows, columns) of a graph.

    Attributes:
        value: its place among the values of the graph.
        codes, scale: keys of its data.
        group: columns that share a scale, their codes have 4 bits; None: a row does, they have 8.
    """

    value: int
    codes: str
    scale: str
    rows: int
    columns: int
    group: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """A program that is read where it lies.

    Attributes:
        values: the flatbuffer.
        data: the segments, mapped.
        shared: data by key that lies in the file beside it, mapped.
    """

    values: Values
    data: npt.NDArray[np.uint8]
    shared: Mapping[str, npt.NDArray[np.uint8]]

    @classmethod
    def open(cls, file: Path, weights: Path | None = None) -> Program:
        """Map a file, and the one beside it whose data it shares.

        Raises:
            ValidationFailed: it is no program, or has more in it than slimport writes.
        """
        values, data = _mapped(file, b"eh00", _PROGRAM, schema.PROGRAM)
        shared = {}
        if weights is not None:
            table, content = _mapped(weights, b"FH01", _WEIGHTS, schema.DATA)
            try:
                for entry in table["named_data"]:
                    place = table["segments"][entry.get("segment_index", 0)]
                    shared[entry["key"]] = _at(content, place)
            except LookupError as error:
                raise malformed(f"{weights.name} has no {error}") from error
        return cls(values, data, shared)

    def method(self, name: str) -> Values:
        """The plan of a method."""
        for plan in self.values.get("execution_plan", []):
            if plan.get("name") == name:
                return dict(plan)
        raise malformed(f"it has no method {name}")

    def segment(self, index: int) -> npt.NDArray[np.uint8]:
        """uint8 (bytes,), mapped."""
        segments = self.values.get("segments", [])
        if index >= len(segments):
            raise malformed(f"it has no segment {index}")
        return _at(self.data, segments[index])

    def named(self, key: str) -> npt.NDArray[np.uint8]:
        """The data that graphs know by this key."""
        if key in self.shared:
            return self.shared[key]
        for entry in self.values.get("named_data", []):
            if entry.get("key") == key:
                return self.segment(entry.get("segment_index", 0))
        raise malformed(f"nothing has the key {key}")

    def constant(self, tensor: Values) -> npt.NDArray[np.uint8]:
        """What the file holds of a tensor that a method reads, and all that lies behind it."""
        held = self.values.get("constant_segment", {})
        offsets = held.get("offsets", [])
        place = tensor.get("data_buffer_idx", 0)
        if not 0 < place < len(offsets):
            raise malformed(f"it has no constant {place}")
        return self.segment(held.get("segment_index", 0))[offsets[place] :]

    def graph(
        self, segment: int, tables: flatbuffer.Schema = schema.XNNPACK
    ) -> tuple[Values, bytes]:
        """What a backend is handed: a graph, and the constants inside of it."""
        content = self.segment(segment).tobytes()
        try:
            _, _, start, size, constants, count = _GRAPH.unpack_from(content)
            values = flatbuffer.decode(tables, content[start : start + size])
        except (ValueError, IndexError, struct.error) as error:
            raise malformed(f"segment {segment} is no graph: {error}") from error
        return values, content[constants : constants + count]

    @staticmethod
    def graphs(method: Values) -> list[int]:
        """The segments of a method's graphs."""
        return [each["processed"].get("index", 0) for each in method.get("delegates", [])]


def _mapped(
    file: Path, magic: bytes, header: struct.Struct, tables: flatbuffer.Schema
) -> tuple[Values, npt.NDArray[np.uint8]]:
    """The flatbuffer of a file, and the data behind it."""
    try:
        content: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
        fields = header.unpack(content[_START : _START + header.size].tobytes())
        found, _, *before, base, nbytes = fields
        if found != magic:
            raise ValueError("it has no header")
        if content.size < base + nbytes:
            raise ValueError(f"it has {content.size} bytes of {base + nbytes}")
        values = flatbuffer.decode(tables, content[: sum(before)].tobytes())
    except (ValueError, IndexError, struct.error) as error:
        raise malformed(f"{file.name} cannot be read: {error}") from error
    return values, content[base:]


def _at(data: npt.NDArray[np.uint8], place: Values) -> npt.NDArray[np.uint8]:
    """What a segment holds."""
    start = place.get("offset", 0)
    return data[start : start + place.get("size", 0)]


def malformed(why: str) -> ValidationFailed:
    return ValidationFailed(
        "a program is not as slimport writes them", why, "export it again from the model"
    )


def coded(graph: Values) -> list[Coded]:
    """The matrices of codes that a graph multiplies by."""
    keys = [entry.get("named_key", "") for entry in graph["constant_data"]]
    found = []
    for index, value in enumerate(graph["xvalues"]):
        kind, fields = value["xvalue_union"]
        if kind != "XNNQuantizedTensorValue" or fields["quant_params"][0] == ROUNDED:
            continue
        tensor, (means, scales) = fields["tensor_value"], fields["quant_params"]
        rows, columns = tensor["dims"]
        group = scales["group_size"] if means == "PerChannelGroupQuant" else None
        codes, scale = keys[tensor["constant_buffer_idx"]], keys[scales["scale_buffer_idx"]]
        found.append(Coded(index, codes, scale, rows, columns, group))
    return found
