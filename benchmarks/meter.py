"""What a piece of work cost: seconds, CPU-seconds and anonymous memory of this process."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_INTERVAL = 0.02  # seconds between two looks at the memory


def cache_folder() -> Path:
    """Where benchmarks keep gigabytes: outside of the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "slimport" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that passed, and CPU-seconds of this process and its children."""

    wall: float
    cpu: float


def cost_of(work: Callable[[], object]) -> Cost:
    start, before = time.perf_counter(), _cpu_seconds()
    work()
    return Cost(time.perf_counter() - start, _cpu_seconds() - before)


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def anonymous(process: int | str = "self") -> int:
    """RssAnon of a process in bytes. Mapped files are left out: the system may drop them."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory apart")


@dataclass(frozen=True, slots=True)
class Run:
    """What a command cost; `peak`: largest RssAnon of its process in bytes."""

    wall: float
    cpu: float
    peak: int
    output: str


def watch(command: Sequence[str]) -> Run:
    """Run a command to its end, its memory looked at every 20 ms.

    Raises:
        CalledProcessError: it failed.
    """
    start, before, peak = time.perf_counter(), _cpu_seconds(), 0
    with (
        tempfile.TemporaryFile() as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            with suppress(OSError):  # it ended between two looks
                peak = max(peak, anonymous(process.pid))
            time.sleep(_INTERVAL)
        wall = time.perf_counter() - start
        out.seek(0)
        output = out.read().decode(errors="replace")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Run(wall, _cpu_seconds() - before, peak, output)


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """A list whose only element is the largest RssAnon seen so far, looked at every 20 ms."""
    peak = [anonymous()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
