"""A program that the converter wrote, written anew: names that repeat, and the weights inside.

MLIR bytecode, version 6, as LLVM documents it (MLIR Bytecode Format): sections of strings, types,
operations, and of blobs with a table of their sizes. Beside that of names and blobs nothing of it
is understood or changed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...errors import ValidationFailed
from . import sdk

MAGIC, VERSION = b"ML\xefR", 6
STRINGS, BLOBS, SIZES = 0, 5, 6
_FILL = b"\xcb"
_RANDOM = re.compile(r"sdpa_[a-z]{8}")  # of each shape of attention, other letters each time


class _Section(NamedTuple):
    kind: int
    content: bytes


class _Blob(NamedTuple):
    """Its name is a place in the table of strings."""

    name: int
    alignment: int


class Skeleton:
    """A program whose blobs are placeholders.

    Args:
        data: main.mlirb as the converter wrote it: it is trusted, and not what a user gives.

    Raises:
        ValidationFailed: another version of the format, or parts of it that were never seen.
    """

    def __init__(self, data: bytes) -> None:
        version, place = _read(data, len(MAGIC))
        if not data.startswith(MAGIC) or version != VERSION:
            raise _unknown(f"its version is {version}, not {VERSION}")
        place = data.index(b"\0", place) + 1
        self._head, self._sections = data[:place], list[_Section]()
        while place < len(data):
            kind, aligned = data[place] & 127, data[place] & 128
            size, place = _read(data, place + 1)
            if aligned:
                alignment, place = _read(data, place)
                place += -place % alignment
                if kind != BLOBS:
                    raise _unknown(f"section {kind} is aligned")
            self._sections.append(_Section(kind, data[place : place + size]))
            place += size
        found = dict(self._sections)
        self._strings = _renamed(_strings(found[STRINGS]))
        self._group, blobs = _blobs(found[SIZES], found[BLOBS])
        self._blobs = tuple(blobs)

    @property
    def names(self) -> list[str]:
        """Of the blobs, in their order."""
        return [self._strings[blob.name].decode() for blob in self._blobs]

    def parts(self, sizes: Mapping[str, int]) -> Iterator[bytes | str]:
        """The whole file: bytes, and in the place of a blob's content its name.

        Args:
            sizes: {name: bytes} of the true contents.
        """
        written = len(self._head)
        yield self._head
        for section in self._sections:
            if section.kind == BLOBS:
                alignment = max(blob.alignment for blob in self._blobs)
                lengths = sum(len(start) + size for _, start, size in self._placed(sizes))
                start = bytes([BLOBS | 128]) + _varint(lengths) + _varint(alignment)
                start += _FILL * (-(written + len(start)) % alignment)
                yield start
                for name, head, size in self._placed(sizes):
                    yield head
                    yield name
                    written += len(head) + size
                written += len(start)
                continue
            content = section.content
            if section.kind == STRINGS:
                content = self._table()
            elif section.kind == SIZES:
                content = self._sizes(sizes)
            whole = bytes([section.kind]) + _varint(len(content)) + content
            written += len(whole)
            yield whole

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Of the whole file."""
        return sum(
            sizes[part] if isinstance(part, str) else len(part) for part in self.parts(sizes)
        )

    def _placed(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes, int]]:
        """Name, what stands before the content, and bytes of the content, of each blob."""
        place = 0  # of an aligned section
        for name, blob in zip(self.names, self._blobs, strict=True):
            head = _varint(blob.alignment) + _varint(sizes[name])
            head += _FILL * (-(place + len(head)) % blob.alignment)
            yield name, head, sizes[name]
            place += len(head) + sizes[name]

    def _sizes(self, sizes: Mapping[str, int]) -> bytes:
        found = _varint(0) + _varint(self._group) + _varint(len(self._blobs))
        for blob, (_, head, size) in zip(self._blobs, self._placed(sizes), strict=True):
            found += _varint(blob.name) + _varint(len(head) + size) + b"\0"
        return found

    def _table(self) -> bytes:
        """Strings as they are stored: the lengths of all from the last on, then the strings."""
        lengths = b"".join(_varint(len(each) + 1) for each in reversed(self._strings))
        return _varint(len(self._strings)) + lengths + b"\0".join(self._strings) + b"\0"


def _strings(section: bytes) -> list[bytes]:
    count, place = _read(section, 0)
    lengths = []
    for _ in range(count):
        length, place = _read(section, place)
        lengths.append(length)
    found = []
    for length in reversed(lengths):
        found.append(section[place : place + length - 1])
        place += length
    return found


def _renamed(strings: list[bytes]) -> list[bytes]:
    """Random names replaced by numbers, in the order of the table."""
    random = [each for each in strings if _RANDOM.fullmatch(each.decode("utf-8", "replace"))]
    numbered = {each: f"sdpa_{index}".encode() for index, each in enumerate(random)}
    return [numbered.get(each, each) for each in strings]


def _blobs(sizes: bytes, blobs: bytes) -> tuple[int, list[_Blob]]:
    """The number of their group, and each in its order."""
    external, place = _read(sizes, 0)
    group, place = _read(sizes, place)
    count, place = _read(sizes, place)
    found, start = [], 0
    for _ in range(count):
        name, place = _read(sizes, place)
        size, place = _read(sizes, place)
        if sizes[place]:
            raise _unknown("a resource is not a blob")
        alignment, _ = _read(blobs, start)
        found.append(_Blob(name, alignment))
        start, place = start + size, place + 1
    if external or place != len(sizes):
        raise _unknown("resources are in several groups")
    return group, found


def _read(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    first = data[place]
    if first == 0:
        return int(struct.unpack_from("<Q", data, place + 1)[0]), place + 9
    length = (first & -first).bit_length()
    return int.from_bytes(data[place : place + length], "little") >> length, place + length


def _varint(value: int) -> bytes:
    """The low bits of the first byte count the bytes that follow: 5 is 0x0b, 200 is 0x22 0x03."""
    for length in range(1, 9):
        if value < 1 << (7 * length):
            return ((value << length) | (1 << (length - 1))).to_bytes(length, "little")
    return b"\0" + struct.pack("<Q", value)


def _unknown(why: str) -> ValidationFailed:
    return ValidationFailed(
        "Core AI's converter wrote a file that is not understood",
        why,
        f"install the tested release: {sdk.INSTALL}",
    )
