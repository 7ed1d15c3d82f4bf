"""The main job as a newcomer runs it: one command on the embedded example, then the checks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle
from slimport.export.gguf import reader

EXAMPLE = Path(__file__).parents[1] / "examples" / "storyteller"
SMALL = {
    "SLIMPORT_WINDOWS": "4",
    "SLIMPORT_WINDOW_LENGTH": "128",
    "SLIMPORT_CALIBRATION_WINDOWS": "8",
    "SLIMPORT_CALIBRATION_LENGTH": "128",
}


def slimport(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slimport", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | SMALL)


def export(output: Path) -> subprocess.CompletedProcess[str]:
    recipe = EXAMPLE / "slimport.toml"
    done = slimport("export", "--target", "android", "--config", recipe, "--output", output)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundle and what the command printed."""
    output = tmp_path_factory.mktemp("demo")
    return output / "android", export(output).stdout


def leaves(value: Any) -> Iterator[Any]:
    """Every value in nested JSON."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def test_one_command_gives_a_judged_bundle(exported: tuple[Path, str]) -> None:
    folder, printed = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["target"], manifest["container"]) == ("android", "gguf")
    assert manifest["validated"] is True and manifest["passed"] is True
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present >= {
        "model.gguf",
        "README.md",
        "tokenizer/golden.json",
        "tokenizer/generation.json",
        "report/report.json",
        "report/measurements.json",
        "report/summary.md",
        "report/report.html",
    }
    for word in ("model.gguf", "held out", "TTFT", "budget", "memory_bytes", "Not executed"):
        assert word in printed


def test_the_report_has_figures(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    report = json.loads((folder / "report/report.json").read_text())
    measured = json.loads((folder / "report/measurements.json").read_text())
    numbers = [leaf for leaf in leaves([report, measured]) if isinstance(leaf, float)]
    assert len(numbers) > 50 and all(map(math.isfinite, numbers))
    held_out = report["accuracy"]["held_out"]
    assert 0 < held_out["kl_mean"] < 0.1 and 0.85 < held_out["top1"] <= 1
    assert held_out["ppl_reference"] < 10  # it was trained
    assert report["errors"]["file"]["codes_equal"] is True
    assert report["errors"]["runtime"]["kl_mean"] < report["errors"]["quantization"]["kl_mean"]
    lengths = [row["prompt_tokens"] for row in measured["speed"]]
    assert lengths == [200, 400, 600, 800, 1000]


def test_verify_check_and_inspect(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    for command in ("verify", "check", "inspect"):
        done = slimport(command, folder)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout
    found = json.loads(slimport("inspect", folder, "--json").stdout)
    assert found["kind"] == "bundle"


def test_one_nibble_is_noticed_by_the_codes_alone(
    exported: tuple[Path, str], tmp_path: Path
) -> None:
    """The manifest is made to fit the altered file; only the digest of the codes is not."""
    folder = shutil.copytree(exported[0], tmp_path / "android")
    file = folder / "model.gguf"
    stored = reader.open_gguf(file).tensors["blk.0.ffn_down.weight"]
    block = bytes(stored.rows[7])
    data = bytearray(file.read_bytes())
    assert data.count(block) == 1
    data[data.index(block) + 5] ^= 0x10  # the fourth code byte, its upper nibble
    file.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    (entry,) = (entry for entry in manifest["files"] if entry["path"] == "model.gguf")
    entry["sha256"] = bundle.sha256(file)
    manifest["bundle_digest"] = bundle.bundle_digest(manifest)
    (folder / "manifest.json").write_bytes(bundle.canonical_json(manifest))
    bundle.verify(folder)  # every file is what the manifest says
    done = slimport("verify", folder)
    assert done.returncode == 7
    assert "model.layers.0.mlp.down_proj.weight" in done.stderr


def test_two_exports_are_the_same_bytes(exported: tuple[Path, str], tmp_path: Path) -> None:
    export(tmp_path)
    one, two = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (exported[0], tmp_path / "android")
    )
    assert one.keys() == two.keys()
    different = {path.as_posix() for path in one if one[path] != two[path]}
    assert different <= bundle.UNLISTED
    assert "report/measurements.json" in different
