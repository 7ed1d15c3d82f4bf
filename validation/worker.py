"""One job in a child process: a crash inside a runtime becomes an error message here.

The parent sends one JSON line and keeps the child's standard input open. Its end means that the
parent is gone, however it died, and the child ends itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import IO, Any, NoReturn

from .. import errors
from .. import log as user_log

Progress = Callable[[int, int], None]
_LAST_LINES = 8
# Threads that spin while they wait make everything ten times slower on a CPU that others use, too.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}  # whatever a child needs is here: nothing is fetched


def call(
    module: str, job: str, arguments: Mapping[str, Any], progress: Progress | None = None
) -> Any:
    """Run `job` of `module` (a module that ends in `serve`) in a child process of its own.

    Args:
        module: such as `slimport.validation.runtimes.reference_worker`.
        job: a name in the table that the module serves.
        arguments: keyword arguments that JSON can hold; the result is what JSON can hold, too.
        progress: called with (done, total) as the job reports it.

    Raises:
        SlimportError: as the job raised it.
        EnvironmentFailed: the system killed the child, most likely for memory.
        ValidationFailed: the child crashed; the message ends with its last log lines.
    """
    command = [sys.executable, "-P", "-m", module]  # -P: nothing is imported from the user's folder
    request = json.dumps({"job": job, "arguments": arguments}).encode() + b"\n"
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_ENVIRONMENT | os.environ | _OFFLINE,
        ) as process:
            try:
                answer = _converse(process, request, progress)
                status = process.wait()
            finally:
                process.kill()
        _keep(f"{module.rpartition('.')[2]} {job} ended with status {status}", log)
        if answer is None:
            raise _crash(module, job, status, log)
    if "error" in answer:
        kind, *lines = answer["error"]
        raise getattr(errors, kind)(*lines)
    return answer["result"]


def _converse(
    process: subprocess.Popen[bytes], request: bytes, progress: Progress | None
) -> dict[str, Any] | None:
    assert process.stdin is not None and process.stdout is not None  # as `call` opened them
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            process.stdin.close()
        return None
    for line in process.stdout:
        message: dict[str, Any] = json.loads(line)
        if "done" not in message:
            return message
        if progress is not None:
            progress(message["done"], message["total"])
    return None


def _keep(what: str, log: IO[bytes]) -> None:
    """Hand on to the user's log what a child printed."""
    if user_log.wanted():
        log.seek(0)
        user_log.say(what, log.read())


def _crash(module: str, job: str, status: int, log: IO[bytes]) -> errors.SlimportError:
    log.seek(0)
    tail = log.read().decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
    last = "; ".join(line.strip() for line in tail) or "it left no log line"
    name = module.rpartition(".")[2]
    if status == -signal.SIGKILL:
        return errors.EnvironmentFailed(
            f"{name} was killed by the system while it ran {job}",
            f"most likely memory ran out; its last lines: {last}",
            "free memory, or validate with fewer and shorter windows",
        )
    ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return errors.ValidationFailed(
        f"{name} crashed while it ran {job} ({ended})",
        f"its last lines: {last}",
        "export it again; if it stays, report these lines: a file that crashes is not fit to ship",
    )


_channel: IO[str] | None = None


def serve(jobs: Mapping[str, Callable[..., Any]]) -> NoReturn:
    """The child's side: read one request, run it, answer, and exit."""
    global _channel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this child
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    try:
        answer = {"result": jobs[request["job"]](**request["arguments"])}
    except errors.SlimportError as error:
        answer = {"error": [type(error).__name__, error.what, error.why, error.cure]}
    _say(answer)
    sys.stderr.flush()
    os._exit(0)  # no teardown of native libraries: the answer stands


def tick(done: int, total: int) -> None:
    """Report progress from within a job."""
    _say({"done": done, "total": total})


def counted(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Each item, with progress reported after it."""
    for done, item in enumerate(items, 1):
        yield item
        tick(done, total)


def threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(message: Mapping[str, Any]) -> None:
    if _channel is not None:  # None when a job is called directly, without a child
        _channel.write(json.dumps(message) + "\n")
        _channel.flush()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
