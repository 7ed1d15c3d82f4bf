"""The verbs end to end with the ORT container."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle, pipeline
from slimport.errors import BadInput
from slimport.export.ort import OPERATORS, layout

Run = Callable[..., Any]
ORT = ["--container", "ort", "-q"]


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A recipe and its bundle, judged in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("ort")
    recipe = recipe_for(folder, tiny_llama)
    with jobs_at_hand("reference", "onnxruntime"):
        done = run("export", "--config", recipe, *ORT)
    assert done.code == 0, done.err
    return recipe, folder / "dist" / "pocket"


def test_the_bundle_is_whole(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert manifest["container"] == "ort"
    assert {"onnxruntime", "onnxruntime-genai", "flatbuffers"} <= manifest["tools"].keys()
    assert report["errors"]["file"]["codes_equal"] and report["errors"]["graph"]["kl_max"] < 1e-9
    names = {"model.ort", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert names | {OPERATORS} <= listed.keys() and "model.onnx" not in listed
    assert report["footprint"]["device_bytes"] == sum(listed[name] for name in names)
    settings = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert settings["filename"] == "model.ort"
    readme = (folder / "README.md").read_text()
    assert "model.ort" in readme and "model.onnx" not in readme and "$" not in readme[:500]
    assert f"--include_ops_by_config {OPERATORS} --enable_reduced_operator_type_support" in readme


def test_verify_check_and_the_forecast(exported: tuple[Path, Path], run: Run) -> None:
    recipe, folder = exported
    assert run("verify", folder).code == 0
    assert run("check", folder).code == 0
    done = run("export", "--config", recipe, *ORT, "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_codes_are_those_of_the_onnx_bundle(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    words = ("--container", "onnx", "--no-validate", "-q", "--output", tmp_path)
    assert run("export", "--config", recipe, *words).code == 0
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (folder, tmp_path / "pocket")
    }
    assert len(digests) == 1


def test_a_flipped_bit_does_not_verify(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    content = bytearray((folder / "model.ort").read_bytes())
    content[len(content) // 2] ^= 0x01
    (folder / "model.ort").write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.ort"):
        pipeline.verify(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:  # somebody who mends the manifest, too
        if entry["path"] == "model.ort":
            entry["sha256"] = bundle.sha256(folder / "model.ort")
    (folder / "manifest.json").write_bytes(bundle.canonical_json(manifest))
    with pytest.raises(BadInput):
        pipeline.verify(folder)


def test_a_model_that_is_too_large_is_refused_before_any_work(
    exported: tuple[Path, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_LARGEST", layout._TABLES + 10_000)
    done = run("export", "--config", exported[0], *ORT, "--output", tmp_path / "dist")
    assert done.code == 5 and "the ORT format cannot hold a model of" in done.err
    assert len(done.err.strip().splitlines()) == 3
    assert not (tmp_path / "dist").exists()
