"""A calibrated quantization that is stopped goes on where it died, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.bundle import UNFINISHED
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, EnvironmentFailed
from slimport.quantize import calibration, quantizer, unfinished, versions
from slimport.quantize.methods import gptq
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import Origin, QuantizedCheckpoint
from slimport.quantize.windows import Windows, windows_of

LAYERS, LINEARS = 3, 7
ORIGIN = Origin("tiny", base="sha256:1", adapters={"tone": "sha256:2"}, scales={"tone": 0.5})


@pytest.fixture(scope="module")
def source(tiny_qwen3: Path) -> Checkpoint:
    return Checkpoint.open(tiny_qwen3)


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = np.random.default_rng(0).integers(0, 400, (6, 32))
    return windows_of(ids.astype(np.int32))


Run = Callable[..., dict[str, bytes]]


@pytest.fixture
def run(source: Checkpoint, windows: Windows) -> Run:
    """run(folder, method="gptq", windows=..., origin=...) -> the files of the checkpoint."""

    def call(
        folder: Path,
        method: str = "gptq",
        windows: Windows = windows,
        origin: Origin = ORIGIN,
        preset: str = "int4",
    ) -> dict[str, bytes]:
        plan = make_plan(decoder_config(source.config), preset, method)
        quantize(
            source,
            source.config,
            plan,
            folder,
            calibration=windows,
            tokenizer_folder=source.folder,
            progress=lambda *_: None,
            origin=lambda: origin,
            resumes=True,
        )
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != UNFINISHED}

    return call


class Solver:
    """gptq.solve, counted; it stops the run before its `end`-th call."""

    def __init__(self, solve: Callable[..., Any]) -> None:
        self.solve, self.calls = solve, 0
        self.end: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def __call__(self, *given: Any) -> Any:
        if self.calls == self.end:
            raise self.error
        self.calls += 1
        return self.solve(*given)


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Solver]:
    counted = Solver(gptq.solve)
    monkeypatch.setattr(gptq, "solve", counted)
    yield counted


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> dict[str, bytes]:
    """The checkpoint of a run that nobody stopped."""
    return run(tmp_path / "whole")


def stop(run: Run, solver: Solver, folder: Path, solved: int, **given: Any) -> None:
    """Stop a run after so many weights."""
    solver.calls, solver.end = 0, solved
    with pytest.raises(type(solver.error)):
        run(folder, **given)
    solver.calls, solver.end = 0, None


@pytest.mark.parametrize("limit", [calibration.IN_MEMORY, 0], ids=["memory", "files"])
def test_it_goes_on_at_the_layer_where_it_died(
    limit: int, run: Run, whole: dict[str, bytes], solver: Solver, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(calibration, "IN_MEMORY", limit)
    for layer in range(1, LAYERS):
        folder = tmp_path / str(layer)
        stop(run, solver, folder, LINEARS * layer + layer)
        assert json.loads((folder / UNFINISHED).read_text())["schema"] == unfinished.SCHEMA
        assert not (folder / "quantization.json").exists()
        assert run(folder) == whole
        assert solver.calls == LINEARS * (LAYERS - layer)


def test_it_dies_again_and_again(
    run: Run, whole: dict[str, bytes], solver: Solver, tmp_path: Path
) -> None:
    """And once more when everything is done, where nothing is left to solve."""
    for _ in range(LAYERS - 1):
        stop(run, solver, tmp_path / "it", LINEARS + 1)
    assert run(tmp_path / "it") == whole and solver.calls == LINEARS
    solver.calls = 0
    assert run(tmp_path / "it") == whole and solver.calls == 0


def test_before_the_first_layer_there_is_nothing_to_keep(
    run: Run, solver: Solver, tmp_path: Path
) -> None:
    stop(run, solver, tmp_path / "it", 3)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (SystemExit(143), True),
        (EnvironmentFailed("the disk is full", "no space", "free some"), True),
        (MemoryError(), True),
        (ValueError("a mistake of ours"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_again_leaves_nothing(
    error: BaseException, stays: bool, run: Run, solver: Solver, tmp_path: Path
) -> None:
    solver.error = error
    stop(run, solver, tmp_path / "it", 2 * LINEARS)
    assert (tmp_path / "it").exists() == stays


def test_the_importance_matrix_is_measured_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"method": "imatrix", "preset": "lut4"}
    whole, rows = run(tmp_path / "whole", **given), []
    solve = quantizer._solve_rows

    def counted(weights: Any, choice: Any, *rest: Any) -> Any:
        if len(rows) == 20 and not ended:
            raise KeyboardInterrupt
        rows.append(choice.weight.layer)
        return solve(weights, choice, *rest)

    ended: list[bool] = []
    monkeypatch.setattr(quantizer, "_solve_rows", counted)
    monkeypatch.setattr(quantizer, "_threads", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "it", **given)
    ended.append(True)
    rows.clear()
    assert run(tmp_path / "it", **given) == whole
    assert min(layer for layer in rows if layer is not None) == 1


ANEW: dict[str, Callable[[Windows], dict[str, Any]]] = {
    "text": lambda windows: {"windows": windows_of(windows.ids[:, ::-1].copy())},
    "plan": lambda _: {"preset": "int8"},
    "base": lambda _: {"origin": replace(ORIGIN, base="sha256:3")},
    "adapter": lambda _: {"origin": replace(ORIGIN, adapters={"tone": "sha256:3"})},
    "its strength": lambda _: {"origin": replace(ORIGIN, scales={"tone": 1.0})},
}


@pytest.mark.parametrize("change", ANEW)
def test_another_run_starts_anew(
    change: str, run: Run, windows: Windows, solver: Solver, tmp_path: Path
) -> None:
    stop(run, solver, tmp_path / "it", 2 * LINEARS + 2)
    given = ANEW[change](windows)
    found = run(tmp_path / "it", **given)
    assert solver.calls == LINEARS * LAYERS
    assert found == run(tmp_path / "fresh", **given)


@pytest.mark.parametrize("name", ["processor", "_code", "version"])
def test_another_processor_code_or_library_starts_anew(
    name: str, run: Run, solver: Solver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(run, solver, tmp_path / "it", 2 * LINEARS + 2)
    monkeypatch.setattr(versions, name, lambda *_: "another")
    run(tmp_path / "it")
    assert solver.calls == LINEARS * LAYERS


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x01
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "a code of layer 0": (lambda folder: flip(folder / "model-00002-of-00005.safetensors", 0.5), 0),
    "a scale of layer 1": (lambda folder: flip(folder / "model-00003-of-00005.safetensors", 1), 1),
    "the header of a shard": (
        lambda folder: flip(folder / "model-00001-of-00005.safetensors", 0.0001),
        0,
    ),
    "a shard is gone": (lambda folder: (folder / "model-00003-of-00005.safetensors").unlink(), 1),
    "its journal": (lambda folder: flip(folder / UNFINISHED, 0.4), 0),
    "its journal is cut": (lambda folder: (folder / UNFINISHED).write_bytes(b'{"schema":'), 0),
    "its journal is empty": (lambda folder: (folder / UNFINISHED).write_bytes(b""), 0),
    "a number in its journal": (lambda folder: forge(folder / UNFINISHED), 0),
}


def forge(path: Path) -> None:
    content = json.loads(path.read_text())
    record = next(iter(content["shards"][1]["records"].values()))
    record["error"] += 1e-3
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again(
    damage: str, run: Run, whole: dict[str, bytes], solver: Solver, tmp_path: Path
) -> None:
    stop(run, solver, tmp_path / "it", 2 * LINEARS + 2)
    harm, kept = DAMAGE[damage]
    harm(tmp_path / "it")
    assert run(tmp_path / "it") == whole
    assert solver.calls == LINEARS * (LAYERS - kept)


def test_a_folder_that_is_half_made_is_no_checkpoint(
    run: Run, solver: Solver, tmp_path: Path
) -> None:
    stop(run, solver, tmp_path / "it", 2 * LINEARS)
    with pytest.raises(BadInput, match=r"no quantization\.json"):
        QuantizedCheckpoint.open(tmp_path / "it")
