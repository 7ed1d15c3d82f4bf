"""The benchmarks start: what they import of the library is still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "name", ["quality", "fit", "kernels", "solver", "export_speed", "export_memory"]
)
def test_each_benchmark_starts(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout


def test_a_model_that_is_not_there_is_skipped(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "quality.py"), "--case", str(tmp_path / "none")]
    shown = subprocess.run([*command, "text", "text"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "skipped" in shown.stdout
