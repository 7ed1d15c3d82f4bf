"""What toolchains print: kept off the terminal, and kept in a file if the user asks for one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from .errors import EnvironmentFailed

_file: IO[bytes] | None = None
_started = 0.0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Append all that is said within the block to a file.

    Raises:
        EnvironmentFailed: the file cannot be written.
    """
    global _file, _started
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise EnvironmentFailed(
            f"the log {path} cannot be written",
            error.strerror or str(error),
            "give another --log, in a folder that is there",
        ) from error
    with file:
        _file, _started = file, time.monotonic()
        try:
            say(f"started {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
            yield
        finally:
            say("ended")
            _file = None


def say(what: str, printed: bytes = b"") -> None:
    """A line with the seconds since the start, and what somebody else printed below it."""
    if _file is not None:
        line = f"[{time.monotonic() - _started:9.2f} s] {what}\n".encode()
        _file.write(line + printed + (b"\n" if printed and not printed.endswith(b"\n") else b""))
