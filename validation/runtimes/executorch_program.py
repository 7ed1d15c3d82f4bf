"""A .pte file as values: its methods, the graphs that they hand to XNNPACK, and its data."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ValidationFailed
from ...export import flatbuffer
from ...export.executorch import schema
from ...export.flatbuffer import Values

_PROGRAM = struct.Struct("<4sIQQQ")  # magic, its size, of the flatbuffer, up to segments, of these
_PROGRAM_START = 8  # behind the root's place and the identifier
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
    """

    values: Values
    data: npt.NDArray[np.uint8]

    @classmethod
    def open(cls, file: Path) -> Program:
        """Map a file.

        Raises:
            ValidationFailed: it is no program, or has more in it than slimport writes.
        """
        try:
            content: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
            header = content[_PROGRAM_START : _PROGRAM_START + _PROGRAM.size].tobytes()
            magic, _, size, base, nbytes = _PROGRAM.unpack(header)
            if magic != b"eh00":
                raise ValueError("it has no header")
            if content.size < base + nbytes:
                raise ValueError(f"it has {content.size} bytes of {base + nbytes}")
            values = flatbuffer.decode(schema.PROGRAM, content[:size].tobytes())
        except (ValueError, IndexError, struct.error) as error:
            raise ValidationFailed(
                f"{file.name} is no ExecuTorch program",
                f"it cannot be read: {error}",
                "export it again from the model",
            ) from error
        return cls(values, content[base:])

    def method(self, name: str) -> Values:
        """The plan of a method."""
        plans = self.values["execution_plan"]
        found: Values = next(plan for plan in plans if plan["name"] == name)
        return found

    def segment(self, index: int) -> npt.NDArray[np.uint8]:
        """uint8 (bytes,), mapped."""
        place = self.values["segments"][index]
        start = place.get("offset", 0)
        return self.data[start : start + place["size"]]

    def named(self, key: str) -> npt.NDArray[np.uint8]:
        """The data that graphs know by this key."""
        (found,) = (entry for entry in self.values["named_data"] if entry["key"] == key)
        return self.segment(found.get("segment_index", 0))

    def graph(self, segment: int) -> tuple[Values, bytes]:
        """What XNNPACK is handed: a graph, and the constants inside of it."""
        content = self.segment(segment).tobytes()
        _, _, start, size, constants, count = _GRAPH.unpack_from(content)
        values = flatbuffer.decode(schema.XNNPACK, content[start : start + size])
        return values, content[constants : constants + count]

    @staticmethod
    def graphs(method: Values) -> list[int]:
        """The segments of a method's graphs."""
        return [delegate["processed"].get("index", 0) for delegate in method["delegates"]]


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
