"""Resident memory of this process, as Linux tells it apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Rss(NamedTuple):
    """Bytes of anonymous pages and of mapped files; None where the system does not tell."""

    anon: int | None
    file: int | None


def rss() -> Rss:
    status = Path("/proc/self/status")
    if not status.exists():
        return Rss(None, None)
    text = status.read_text()
    anon, mapped = (re.search(rf"{key}:\s+(\d+) kB", text) for key in ("RssAnon", "RssFile"))
    return Rss(anon and int(anon[1]) * 1024, mapped and int(mapped[1]) * 1024)


def gained(before: Rss) -> dict[str, int | None]:
    """`rss_anon` and `rss_file`: what was added since `before`."""
    now = rss()
    return {
        "rss_anon": None if now.anon is None or before.anon is None else now.anon - before.anon,
        "rss_file": None if now.file is None or before.file is None else now.file - before.file,
    }
