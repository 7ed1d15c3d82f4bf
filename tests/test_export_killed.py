"""kill -9 of a real export or quantization at any moment: the old or the new, never a half."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from slimport import pipeline
from slimport.quantize.store import QuantizedCheckpoint

# Everything is imported once and each export is a process forked from that, so that the moments
# that matter are not drowned in the seconds of start-up. No thread runs before the fork.
SERVER = """
import json, os, signal, sys, time
import torch
from slimport import bundle, cli, pipeline
from slimport.quantize.methods import gptq
from slimport.terminal import views

def die_after(weights):
    "SIGKILL this process when it has solved so many weights and begins with the next."
    solve, solved = gptq.solve, 0
    def counted(*given):
        nonlocal solved
        if solved == weights:
            os.kill(os.getpid(), signal.SIGKILL)
        solved += 1
        return solve(*given)
    gptq.solve = counted

def die_at(step):
    "SIGKILL this process before its step-th change to the disk from the swap on."
    taken = 0
    def counted(function):
        def call(*arguments, **keywords):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    swap = bundle._swap
    def begin(*arguments):
        for name in ("rename", "fsync", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        bundle._exchange = counted(bundle._exchange)
        swap(*arguments)
    bundle._swap = begin

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not job["exchange"]:
            bundle._exchange = lambda one, other: False
        if job["step"]:
            die_at(job["step"])
        if job["solved"] is not None:
            die_after(job["solved"])
        os._exit(cli.main(job["arguments"]))
    if job["after"] is not None:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = 25  # changes to the disk by a swap and by the cleaning up after it


@dataclass(frozen=True)
class Exports:
    """Exports of a tiny model to a bundle in `output`, each in a process of its own."""

    server: subprocess.Popen[str]
    model: Path
    output: Path

    result = "android"

    @property
    def command(self) -> list[str]:
        """The verb and where it writes."""
        return ["export", "--target", "android", "--no-validate", "-o", str(self.output)]

    def run(
        self,
        preset: str,
        *method: str,
        after: float | None = None,
        step: int = 0,
        exchange: bool = True,
        solved: int | None = None,
    ) -> int:
        """The exit code; -9 if killed: `after` seconds, before the `step`-th change of a swap, or
        when it has `solved` so many weights."""
        assert self.server.stdin is not None and self.server.stdout is not None
        words = method or ("--method", "rtn")
        arguments = [*self.command, str(self.model), *words, "--preset", preset, "-q"]
        job = {
            "arguments": arguments,
            "after": after,
            "step": step,
            "exchange": exchange,
            "solved": solved,
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    @property
    def digest(self) -> str:
        """Of the bundle that stands there, every file and every code of it verified."""
        return str(pipeline.verify(self.output / self.result)["weights_digest"])

    @property
    def left(self) -> list[str]:
        return [path.name for path in self.output.iterdir() if not path.name.endswith("lock")]


class Quantizations(Exports):
    """Quantizations of a tiny model to a checkpoint in `output`."""

    result = "quantized"

    @property
    def command(self) -> list[str]:
        return ["quantize", "-o", str(self.output / self.result)]

    @property
    def digest(self) -> str:
        """Of the checkpoint that stands there, every code of it verified."""
        found = QuantizedCheckpoint.open(self.output / self.result)
        found.verify()
        return found.weights_digest


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.fixture
def exports(server: subprocess.Popen[str], tiny_llama: Path, tmp_path: Path) -> Exports:
    return Exports(server, tiny_llama, tmp_path / "dist")


@pytest.fixture
def quantizations(server: subprocess.Popen[str], tiny_llama: Path, tmp_path: Path) -> Quantizations:
    (tmp_path / "work").mkdir()
    return Quantizations(server, tiny_llama, tmp_path / "work")


def kill_many(exports: Exports, kinds: list[str], chance: random.Random) -> None:
    """Write over a good one, be killed, look; then write again and find nothing left behind."""
    presets = ["int4", "int4-all"]
    digests = {}
    for preset in presets:
        start = time.monotonic()
        assert exports.run(preset) == 0
        usual = time.monotonic() - start
        digests[preset] = exports.digest
    old, new = reversed(presets)
    killed = {"old": 0, "new": 0}
    for kind in kinds:
        if kind == "moment":
            code = exports.run(new, after=chance.uniform(0, usual))
        else:
            step = chance.randint(1, STEPS)
            code = exports.run(new, step=step, exchange=kind == "exchange")
        found = exports.digest
        assert found in (digests[old], digests[new]), kind
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            assert found == digests[new]
        else:
            killed["old" if found == digests[old] else "new"] += 1
        if found == digests[new]:
            old, new = new, old
    assert killed["old"] and killed["new"] and sum(killed.values()) > len(kinds) / 2, killed
    assert exports.run(new) == 0
    assert exports.digest == digests[new]
    assert exports.left == [exports.result]


def test_sixty_kills(exports: Exports) -> None:
    """At any moment, and between any two changes to the disk around the swap."""
    kill_many(exports, 20 * ["moment", "exchange", "renames"], random.Random(1))


def test_thirty_kills_of_a_quantization(quantizations: Quantizations) -> None:
    kill_many(quantizations, 10 * ["moment", "exchange", "renames"], random.Random(2))


def test_kills_from_the_very_start(tiny_llama: Path, tmp_path: Path) -> None:
    """The command as a user starts it, imports and all, the first time in an empty folder."""
    command = [
        sys.executable, "-m", "slimport", "export", str(tiny_llama), "--target", "android",
        "--method", "rtn", "--no-validate", "-q", "-o", str(tmp_path / "dist"),
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - start
    chance = random.Random(4)
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(0.4, 1) * usual)
            process.kill()
        pipeline.verify(tmp_path / "dist" / "android")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    names = [path.name for path in (tmp_path / "dist").iterdir()]
    assert [name for name in names if not name.endswith("lock")] == ["android"]


LINEARS = 7  # of a layer


def kill_between_layers(
    exports: Exports, recipe_for: Callable[..., Path], folder: Path, layers: int
) -> None:
    """A run that is killed in every layer ends as one that is not, and leaves nothing."""
    recipe = recipe_for(folder, exports.model)
    method = ("--method", "gptq", "--config", str(recipe))
    assert exports.run("int4", *method) == 0
    digest = exports.digest
    assert exports.run("int8", *method) == 0
    other = exports.digest
    assert exports.run("int4", *method, solved=LINEARS + 1) == -signal.SIGKILL
    for _ in range(2, layers):  # a run from the start would not end the layer that it begins with
        assert exports.run("int4", *method, solved=LINEARS + 1) == -signal.SIGKILL
        assert exports.digest == other
    assert exports.run("int4", *method, solved=LINEARS) == 0
    assert exports.digest == digest
    assert exports.left == [exports.result]
    # Another plan than the one that died.
    assert exports.run("int8", *method, solved=LINEARS + 1) == -signal.SIGKILL
    assert exports.run("int4", *method, solved=LINEARS * layers - 1) == -signal.SIGKILL
    assert exports.digest == digest
    assert exports.run("int4", *method, solved=LINEARS) == 0
    assert exports.digest == digest
    assert exports.left == [exports.result]


def test_an_export_goes_on_at_the_layer_where_it_was_killed(
    exports: Exports, tiny_qwen3: Path, recipe_for: Callable[..., Path], tmp_path: Path
) -> None:
    kill_between_layers(replace(exports, model=tiny_qwen3), recipe_for, tmp_path / "in", 3)


def test_a_quantization_goes_on_at_the_layer_where_it_was_killed(
    quantizations: Quantizations, tiny_qwen3: Path, recipe_for: Callable[..., Path], tmp_path: Path
) -> None:
    kill_between_layers(replace(quantizations, model=tiny_qwen3), recipe_for, tmp_path / "in", 3)
