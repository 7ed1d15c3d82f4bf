"""How a bundle travels to the phone, and 16 KB pages."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from slimport.errors import BadInput
from slimport.targets.limits import findings, load_alignment
from slimport.targets.target import load_target

ANDROID = load_target("android")


@pytest.mark.parametrize(
    ("count", "level", "words"),
    [
        (200_000_000, "note", "200 MB download fits the app's base or feature module"),
        (200_000_001, "note", "one AI pack"),
        (1_500_000_001, "warning", "split it over several"),
        (4_000_000_001, "warning", "the app must download it itself"),
    ],
)
def test_delivery(tmp_path: Path, count: int, level: str, words: str) -> None:
    (found,) = findings(ANDROID, tmp_path, count)
    assert found.level == level and words in found.message and found.source


def elf(*segments: tuple[int, int]) -> bytes:
    """A 64-bit ELF header and program headers of (kind, alignment), by `man 5 elf`."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 183, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    rows = [struct.pack("<IIQQQQQQ", kind, 5, 0, 0, 0, 9, 9, align) for kind, align in segments]
    return header + b"".join(rows)


def test_pages(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/new.so").write_bytes(elf((1, 16384), (1, 65536), (2, 8)))
    assert len(findings(ANDROID, tmp_path, 1)) == 1
    (tmp_path / "lib/old.so").write_bytes(elf((1, 16384), (1, 4096)))
    found = findings(ANDROID, tmp_path, 1)[1]
    assert found.level == "refused"
    assert found.message == "old.so is aligned to 4096 bytes, pages have 16384"


@pytest.mark.parametrize("data", [b"", b"MZ", elf((1, 4096))[:80], elf(), elf((2, 8))])
def test_not_a_library(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.so").write_bytes(data)
    with pytest.raises(BadInput):
        load_alignment(tmp_path / "odd.so")
