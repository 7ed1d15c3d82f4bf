"""The verbs end to end for a phone's GPU, whose file nothing executes here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import pipeline
from slimport.errors import BadInput

Run = Callable[..., Any]
GPU = ["--target", "android-gpu", "-q"]


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A recipe and its bundle, judged as an eager model."""
    folder = tmp_path_factory.mktemp("vulkan")
    recipe = recipe_for(folder, tiny_llama)
    with jobs_at_hand("reference", "executorch", "executorch_vulkan"):
        done = run("export", "--config", recipe, *GPU)
    assert done.code == 0, done.err
    return recipe, folder / "dist" / "android-gpu"


def test_the_bundle_says_that_nothing_executed_it(exported: tuple[Path, Path], run: Run) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert manifest["container"] == "executorch-vulkan"
    assert manifest["validated"] is False and manifest["judged"] and manifest["passed"]
    assert manifest["executed"] == report["executed"] == []
    said = "structure checked, not executed"
    assert any(said in words for words in report["not_executed"])
    assert report["not_executed"] == manifest["not_executed"]
    assert "eager interpreter" in report["runtime"]
    assert report["accelerator"] == {"gpu_nodes": 1.0, "gpu_weight_bytes": 1.0}
    assert report["errors"]["file"]["codes_equal"] and report["errors"]["graph"]["kl_max"] < 1e-9
    pages = [folder / "README.md", *(folder / "report").glob("*")]
    assert len(pages) == 6
    for page in pages:
        assert "validated" not in page.read_text().lower(), page
    readme = (folder / "README.md").read_text()
    assert "No GPU executed it" in readme and "executorch-android-vulkan" in readme
    assert "$" not in readme.split("```")[0]
    for name in ("summary.md", "report.html"):
        assert said in (folder / "report" / name).read_text()


def test_verify_check_and_the_forecast(exported: tuple[Path, Path], run: Run) -> None:
    recipe, folder = exported
    assert run("verify", folder).code == 0
    checked = run("check", folder, "--json")
    assert checked.code == 0 and len(checked.json["budgets"]) > 4
    done = run("export", "--config", recipe, *GPU, "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_a_bundle_that_nothing_judged_is_refused(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    """And its bytes are those of the judged one, and its codes those of any other container."""
    recipe, folder = exported
    words = ("--no-validate", "-q", "--output", tmp_path)
    assert run("export", "--config", recipe, *GPU, *words).code == 0
    plain = tmp_path / "android-gpu"
    assert run("check", plain).code == 4
    assert (plain / "model.pte").read_bytes() == (folder / "model.pte").read_bytes()
    assert run("export", "--config", recipe, "--container", "gguf", *words).code == 0
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (folder, tmp_path / "pocket")
    }
    assert len(digests) == 1


def test_a_flipped_bit_does_not_verify(exported: tuple[Path, Path]) -> None:
    file = exported[1] / "model.pte"
    whole = file.read_bytes()
    content = bytearray(whole)
    content[-100] ^= 0x01
    try:
        file.write_bytes(content)
        with pytest.raises(BadInput, match=r"model\.pte"):
            pipeline.verify(exported[1])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "nf4"], "Vulkan backend cannot multiply the grid nf4-g64"),
        (["--preset", "int2"], "Vulkan backend cannot multiply the grid int2-g64"),
        (["--preset", "int4-signed"], "Vulkan backend cannot multiply the grid int4-g32-signed"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    words: list[str], said: str, tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    done = run("export", "--config", recipe, *GPU, *words, "--output", tmp_path / "new")
    assert done.code == 5 and said in done.err, done.err
    assert not (tmp_path / "new").exists()
