"""What a platform and its store allow: findings that advise how to deliver a bundle.

A budget is ours and breaks a build; a limit is the store's and most of them only decide how the
files travel (inside the app, as a pack, downloaded by the app).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import BadInput
from ..settings import format_size
from .target import Limit, Target

Level = Literal["note", "warning", "refused"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about a limit; "refused" means that the store or the system would refuse."""

    level: Level
    message: str
    source: str


def findings(target: Target, folder: Path, download_bytes: int) -> list[Finding]:
    """How the bundle in `folder` stands to the limits of `target`; `download_bytes` compressed.

    Raises:
        BadInput: a shared library that is not an ELF file.
    """
    return [*_delivery(target, download_bytes), *_pages(target, folder)]


def _delivery(target: Target, count: int) -> Iterator[Finding]:
    """The smallest way of delivery that the download fits."""
    ways: tuple[tuple[str, Level, str], ...] = (
        ("store_module", "note", "fits the app's base or feature module"),
        ("store_pack", "note", "too large for a module: ship it as one AI pack or asset pack"),
        ("store_packs_total", "warning", "too large for one pack: split it over several"),
    )
    limit: Limit | None = None
    for key, level, advice in ways:
        limit = target.limits.get(key)
        if limit and count <= limit.limit:
            yield Finding(level, f"{format_size(count)} download {advice}", limit.source)
            return
    if limit:
        advice = "larger than the store delivers: the app must download it itself"
        yield Finding("warning", f"{format_size(count)} download is {advice}", limit.source)


def _pages(target: Target, folder: Path) -> Iterator[Finding]:
    """Shared libraries whose segments are aligned to less than the platform's page."""
    page = target.limits.get("page")
    if page is None:
        return
    for path in sorted(folder.rglob("*.so")):
        if (alignment := load_alignment(path)) < page.limit:
            words = f"{path.name} is aligned to {alignment} bytes, pages have {page.limit:.0f}"
            yield Finding("refused", words, page.source)


_PT_LOAD = 1


def load_alignment(path: Path) -> int:
    """The smallest alignment in bytes of the loadable segments of a 64-bit ELF file (`man 5 elf`).

    Raises:
        BadInput: it is no little-endian 64-bit ELF file with loadable segments.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) == 64 and header[:6] == b"\x7fELF\x02\x01":
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            rows = file.read(size * count)
            if size >= 56 and len(rows) == size * count:
                segments = [struct.unpack_from("<I44xQ", rows, at * size) for at in range(count)]
                if loads := [alignment for kind, alignment in segments if kind == _PT_LOAD]:
                    return int(min(loads))
    raise BadInput(
        f"{path.name} is not a 64-bit ELF library",
        "its page alignment cannot be read",
        "build it for arm64-v8a again",
    )
