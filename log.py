"""What toolchains print: kept off the terminal, and kept in a file if the user asks for one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from .errors import EnvironmentFailed, UsageError

_file: IO[bytes] | None = None
_started = 0.0
_MARK = "["  # how each line of ours begins, and so each log


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Append all that is said within the block to a file that is new, or a log.

    Raises:
        UsageError: the file is no log.
        EnvironmentFailed: it cannot be written.
    """
    global _file, _started
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as found:
                _refuse_other(path, found.read(1))
        file = path.open("ab", buffering=0)
    except (OSError, ValueError) as error:
        raise EnvironmentFailed(
            f"the log {path} cannot be written",
            getattr(error, "strerror", None) or str(error),
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


def wanted() -> bool:
    """Whether there is a log."""
    return _file is not None


def say(what: str, printed: bytes = b"") -> None:
    """A line with the seconds since the start, and what somebody else printed below it.

    A log that cannot be written any more ends with a warning: the work goes on.
    """
    global _file
    if _file is None:
        return
    line = f"{_MARK}{time.monotonic() - _started:9.2f} s] {what}\n".encode()
    try:
        _file.write(line + printed + (b"\n" if printed and not printed.endswith(b"\n") else b""))
    except OSError as error:
        _file = None
        print(f"the log ends here: {error.strerror or error}", file=sys.stderr)


def _refuse_other(path: Path, start: bytes) -> None:
    if start != _MARK.encode():
        raise UsageError(
            f"{path} is no log",
            "something else stands in it, to which nothing may be added",
            "give --log a new file",
        )
