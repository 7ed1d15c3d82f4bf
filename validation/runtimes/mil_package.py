"""A Core ML package as values: its program, and the weights that lie beside it.

The messages are those of coremltools' MIL.proto, the weights those of its MILBlob/Blob/
StorageFormat.hpp, version 2: a header, and for each tensor a record that says where its bytes lie.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import BadInput, ValidationFailed
from ...export.coreml.proto import messages

_HEADER = struct.Struct("<II")  # tensors, version
_RECORD = struct.Struct("<IIQQQ")  # sentinel, data type, bytes, where they begin, unused bits
_VERSION, _SENTINEL, _ALIGNMENT = 2, 0xDEADBEEF, 64
_BESIDE = "@model_path/"
_LARGEST = 2**31 - 1  # bytes of a message


class Kind(NamedTuple):
    """A data type of a tensor.

    Attributes:
        bits: of a number where it lies.
        dtype: numpy's, of a number that is read.
    """

    bits: int
    dtype: str


KINDS = {
    "BOOL": Kind(8, "?"),
    "FLOAT16": Kind(16, "<f2"),
    "FLOAT32": Kind(32, "<f4"),
    "INT4": Kind(4, "i1"),
    "INT8": Kind(8, "i1"),
    "INT16": Kind(16, "<i2"),
    "INT32": Kind(32, "<i4"),
    "UINT1": Kind(1, "u1"),
    "UINT2": Kind(2, "u1"),
    "UINT3": Kind(3, "u1"),
    "UINT4": Kind(4, "u1"),
    "UINT6": Kind(6, "u1"),
    "UINT8": Kind(8, "u1"),
    "UINT16": Kind(16, "<u2"),
    "UINT32": Kind(32, "<u4"),
}
_BLOB_KINDS = {1: "FLOAT16", 2: "FLOAT32", 3: "UINT8", 4: "INT8", 6: "INT16", 7: "UINT16"}
_BLOB_KINDS |= {8: "INT4", 9: "UINT1", 10: "UINT2", 11: "UINT4", 12: "UINT3", 13: "UINT6"}
_BLOB_KINDS |= {14: "INT32", 15: "UINT32"}
_FIELDS = {
    "floats": ("FLOAT32",),
    "ints": ("INT8", "INT16", "INT32", "UINT8", "UINT16"),
    "bools": ("BOOL",),
}


class Type(NamedTuple):
    """What a program says of a tensor: its data type and its shape, None where any size may be."""

    kind: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join('?' if n is None else str(n) for n in self.shape)})"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a package.

    Attributes:
        content: uint8, all its bytes; numbers of fewer bits are packed, the first one lowest.
    """

    kind: str
    shape: tuple[int, ...]
    content: npt.NDArray[np.uint8]

    @property
    def aligned(self) -> bool:
        """Each place of the first axis begins a byte."""
        return not self.shape or math.prod(self.shape[1:]) * KINDS[self.kind].bits % 8 == 0

    def numbers(self, places: npt.NDArray[np.int64] | None = None) -> npt.NDArray[Any]:
        """Unpacked, with its shape; or with `places` of the first axis, (places, *shape[1:])."""
        if places is None:
            count = math.prod(self.shape)
            return _unpacked(self.content, self.kind)[:count].reshape(self.shape)
        if not self.aligned:
            found: npt.NDArray[Any] = self.numbers()[places]
            return found
        nbytes = math.prod(self.shape[1:]) * KINDS[self.kind].bits // 8
        rows = self.content.reshape(self.shape[0], nbytes)[places]
        return _unpacked(rows.reshape(-1), self.kind).reshape(len(places), *self.shape[1:])


Value = Stored | str | list[Any]


@dataclass(frozen=True, slots=True)
class Package:
    """A package that is read where it lies.

    Attributes:
        model: the message Model.
        folder: where the model's file is; weights lie below.
    """

    model: Any
    folder: Path
    _files: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    @classmethod
    def open(cls, package: Path) -> Package:
        """Read the program of a package; its weights stay on disk.

        Raises:
            BadInput: it or its model is not there.
            ValidationFailed: it is no package of an ML Program.
        """
        file = _file(package)
        model = messages("Model").Model()
        from google.protobuf.message import DecodeError

        try:
            if file.stat().st_size > _LARGEST:
                raise malformed(f"{file.name} has more bytes than a message may have")
            model.ParseFromString(file.read_bytes())
        except DecodeError as error:
            raise malformed(f"{file.name} cannot be read: {error}") from error
        except OSError as error:
            raise _unreadable(file, error) from error
        if model.WhichOneof("Type") != "mlProgram" or not model.mlProgram.functions:
            raise malformed(f"{file.name} has no ML Program")
        return cls(model, file.parent)

    @property
    def functions(self) -> list[str]:
        """Their names; the default one is the first."""
        names = sorted(self.model.mlProgram.functions)
        default = self.model.description.defaultFunctionName or "main"
        return sorted(names, key=lambda name: name != default)

    def value(self, message: Any) -> Value:
        """What a message Value says: a tensor, a text, or a list of them.

        Raises:
            ValidationFailed: it has another size or data type than it says, or lies where nothing
                is.
        """
        given = message.type.WhichOneof("type")
        if given == "listType":
            return [self.value(each) for each in message.immediateValue.list.values]
        if given != "tensorType":
            raise malformed(f"a constant is a {given}")
        kind, dims = type_of(message.type.tensorType)
        shape = tuple(size for size in dims if size is not None)
        if len(shape) != len(dims):
            raise malformed("a constant has no fixed shape")
        if message.WhichOneof("value") == "blobFileValue":
            if kind not in KINDS:
                raise malformed(f"a weight of {kind} lies in a file")
            place = message.blobFileValue
            return Stored(kind, shape, self._blob(place.fileName, place.offset, kind, shape))
        return _immediate(message.immediateValue.tensor, kind, shape)

    def _blob(
        self, name: str, offset: int, kind: str, shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8]:
        content = self._mapped(name)
        where = f"{name} at {offset}"
        if offset % _ALIGNMENT or offset + _RECORD.size > content.size:
            raise malformed(f"{where}: no tensor can begin there")
        record = content[offset : offset + _RECORD.size].tobytes()
        sentinel, code, nbytes, start, unused = _RECORD.unpack(record)
        if sentinel != _SENTINEL:
            raise malformed(f"{where}: no tensor begins there")
        if _BLOB_KINDS.get(code) != kind:
            found = _BLOB_KINDS.get(code, f"data type {code}")
            raise malformed(f"{where}: it has {found}, the program says {kind}")
        bits = math.prod(shape) * KINDS[kind].bits
        if nbytes * 8 - bits != unused or unused > 7:
            raise malformed(f"{where}: it has {nbytes} bytes, {unused} bits of them unused, for"
                            f" {Type(kind, shape)}")  # fmt: skip
        if start % _ALIGNMENT or start + nbytes > content.size:
            raise malformed(f"{where}: its {nbytes} bytes at {start} are not in the file, which has"
                            f" {content.size}")  # fmt: skip
        return content[start : start + nbytes]

    def _mapped(self, name: str) -> npt.NDArray[np.uint8]:
        if name not in self._files:
            path = _inside(self.folder, name.removeprefix(_BESIDE))
            try:
                # Copied on write: torch warns about what it may not write.
                content: npt.NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "c"))
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from error
            if content.size < _HEADER.size:
                raise malformed(f"{name} has {content.size} bytes")
            _, version = _HEADER.unpack(content[: _HEADER.size].tobytes())
            if version != _VERSION:
                raise malformed(f"{name} is of version {version}, not {_VERSION}")
            self._files[name] = content
        return self._files[name]


def type_of(tensor: Any) -> Type:
    """What a message TensorType says.

    Raises:
        ValidationFailed: its rank is unknown, or not the number of its dimensions.
    """
    names = messages("MIL").DataType
    kind = names.Name(tensor.dataType) if tensor.dataType in names.values() else "?"
    if tensor.rank != len(tensor.dimensions):
        raise malformed(f"a tensor of rank {tensor.rank} has {len(tensor.dimensions)} dimensions")
    shape: list[int | None] = []
    for each in tensor.dimensions:
        if each.unknown.variadic:
            raise malformed("a tensor is of any rank")
        constant = each.WhichOneof("dimension") == "constant"
        shape.append(int(each.constant.size) if constant else None)
    return Type(kind, tuple(shape))


def _immediate(tensor: Any, kind: str, shape: tuple[int, ...]) -> Value:
    """A value that the program itself holds."""
    name, count = tensor.WhichOneof("value"), math.prod(shape)
    if kind == "STRING":
        texts = list(tensor.strings.values)
        if len(texts) != count or len(shape) > 1:
            raise malformed(f"{len(texts)} texts are {Type(kind, shape)}")
        return texts if shape else str(texts[0])
    if kind not in KINDS:
        raise malformed(f"a constant is of {kind}")
    if name is None and not count:
        return Stored(kind, shape, np.zeros(0, np.uint8))
    if name == "bytes":
        content = np.frombuffer(tensor.bytes.values, np.uint8)
        if content.size != (count * KINDS[kind].bits + 7) // 8:
            raise malformed(f"{content.size} bytes are {Type(kind, shape)}")
        return Stored(kind, shape, content.copy())
    if kind not in _FIELDS.get(name, ()):
        raise malformed(f"{name} are {Type(kind, shape)}")
    given = np.array(getattr(tensor, name).values)
    if given.size != count:
        raise malformed(f"{given.size} numbers are {Type(kind, shape)}")
    numbers = given.astype(KINDS[kind].dtype)
    if name == "ints" and (numbers != given).any():
        raise malformed(f"numbers are beyond {kind}")
    return Stored(kind, shape, numbers.view(np.uint8))


def _unpacked(content: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    """All numbers that the bytes have room for, (count,)."""
    bits, dtype = KINDS[kind]
    found: npt.NDArray[Any] = content
    if bits >= 8:
        found = content != 0 if kind == "BOOL" else content.view(dtype)
        return found
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        found = ((content[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)
    else:
        ones = np.unpackbits(content, bitorder="little")
        planes = ones[: ones.size // bits * bits].reshape(-1, bits)
        found = np.packbits(planes, axis=1, bitorder="little").reshape(-1)
    if dtype == "i1":
        half = np.int8(2 ** (bits - 1))
        found = (found.view(np.int8) ^ half) - half
    return found


def _file(package: Path) -> Path:
    """The file of the model that a package's manifest names."""
    manifest = package / "Manifest.json"
    try:
        told = json.loads(manifest.read_bytes())
        name = told["itemInfoEntries"][told["rootModelIdentifier"]]["path"]
        return _inside(package / "Data", str(name))
    except OSError as error:
        raise _unreadable(manifest, error) from error
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        raise malformed(f"{manifest.name} names no model: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """A file below a folder.

    Raises:
        ValidationFailed: the name leads out of it.
    """
    parts = PurePosixPath(name)
    if not parts.parts or "\0" in name or parts.is_absolute() or ".." in parts.parts:
        raise malformed(f"it names the file {name!r}")
    path = folder / parts
    if not path.resolve().is_relative_to(folder.resolve()):
        raise malformed(f"its file {name!r} lies outside of it")
    return path


def malformed(why: str) -> ValidationFailed:
    return ValidationFailed(
        "a Core ML package is not as Core ML reads them", why, "export it again from the model"
    )


def refused(kind: str, name: str, why: str) -> ValidationFailed:
    """An operation that cannot be run, by its type and the name of its output."""
    return malformed(f"its operation {kind} {name}: {why}")


def _unreadable(file: Path, error: Exception) -> BadInput:
    why = getattr(error, "strerror", None) or str(error)
    return BadInput(
        f"{file.name} of a Core ML package cannot be read", why, "export it again from the model"
    )


def names_of(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
