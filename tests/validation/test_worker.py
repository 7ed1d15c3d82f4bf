"""A job in a child process: answers, errors, crashes, and no child that outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimport import log
from slimport.errors import EnvironmentFailed, Unsupported, UsageError, ValidationFailed
from slimport.validation import worker

JOBS = """
import os, signal, sys, time
from slimport.errors import Unsupported
from slimport.validation import worker

def add(a, b):
    print("noise that must not stand between the answers")
    return a + b

def steps(total):
    return [item for item in worker.counted(range(total), total)]

def refuse():
    raise Unsupported("what", "why", "cure")

def fail():
    raise RuntimeError("something unforeseen")

def die(number):
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)

def stay(pid_file):
    open(pid_file + ".part", "w").write(str(os.getpid()))
    os.rename(pid_file + ".part", pid_file)
    time.sleep(600)

if __name__ == "__main__":
    worker.serve(dict(add=add, steps=steps, refuse=refuse, fail=fail, die=die, stay=stay))
"""


@pytest.fixture(autouse=True)
def jobs(tmp_path, monkeypatch):
    (tmp_path / "some_jobs.py").write_text(JOBS)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


def call(job, progress=None, **arguments):
    return worker.call("some_jobs", job, arguments, progress)


def test_an_answer_comes_back():
    assert call("add", a=[1], b=[2]) == [1, 2]


def test_a_large_request_comes_through():
    assert len(call("add", a=list(range(300_000)), b=[0])) == 300_001


def test_progress_is_reported():
    done = []
    assert call("steps", total=3, progress=lambda *step: done.append(step)) == [0, 1, 2]
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_an_error_keeps_its_class_and_lines():
    with pytest.raises(Unsupported) as caught:
        call("refuse")
    assert str(caught.value) == "what\nwhy\ncure"


def test_an_unforeseen_error_ends_with_its_last_lines():
    with pytest.raises(ValidationFailed, match="some_jobs crashed while it ran fail") as caught:
        call("fail")
    assert "RuntimeError: something unforeseen" in caught.value.why


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_names_its_signal_and_last_words(name):
    with pytest.raises(ValidationFailed, match=name) as caught:
        call("die", number=int(getattr(signal, name)))
    assert "the last words" in caught.value.why


def test_a_killed_child_points_at_memory():
    with pytest.raises(EnvironmentFailed, match="killed by the system") as caught:
        call("die", number=int(signal.SIGKILL))
    assert "memory" in caught.value.why


def test_a_module_that_does_not_start_is_told():
    with pytest.raises(ValidationFailed, match="crashed") as caught:
        worker.call("no_such_module_at_all", "job", {"large": "x" * 1_000_000})
    assert "No module named" in caught.value.why


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_child_does_not_outlive_its_parent(name, tmp_path):
    file = tmp_path / "pid"
    code = (
        "from slimport.validation import worker;"
        f"worker.call('some_jobs', 'stay', {{'pid_file': {str(file)!r}}})"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        assert _until(file.exists)
        parent.send_signal(getattr(signal, name))
    assert _until(lambda: not _runs(int(file.read_text())))


def _until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def _runs(pid):
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_child_prints_goes_to_the_users_log(tmp_path):
    with log.writing(tmp_path / "log.txt"):
        assert call("add", a=1, b=2) == 3
        with pytest.raises(ValidationFailed):
            call("die", number=int(signal.SIGSEGV))
    assert call("add", a=1, b=2) == 3
    text = (tmp_path / "log.txt").read_text()
    assert text.count("some_jobs add ended with status 0") == 1
    assert text.count("noise that must not stand") == 1 and "the last words" in text
    assert "some_jobs die ended with status -11" in text
    with log.writing(tmp_path / "log.txt"):
        pass
    assert (tmp_path / "log.txt").read_text().startswith(text)
    with pytest.raises(EnvironmentFailed, match="cannot be written"), log.writing(tmp_path):
        pass
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is no log"), log.writing(tmp_path / "model.gguf"):
        pass
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_log_that_cannot_be_written_any_more_ends_and_nothing_else(capsys):
    with log.writing(Path("/dev/full")):
        assert call("add", a=1, b=2) == 3
    assert capsys.readouterr().err.count("the log ends here") == 1
