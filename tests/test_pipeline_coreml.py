"""The verbs end to end for iPhones, whose packages an interpreter judges here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import pipeline
from slimport.errors import BadInput
from slimport.validation.runtimes import coreml
from slimport.validation.runtimes.mil import functions

Run = Callable[..., Any]
CONTAINER = ["--container", "coreml", "-q"]
IOS = 'extends = "ios18-gpu"\ncontext_length = 64\nprompt_lengths = [16, 32]\n'
PACKAGE = ("Manifest.json", *(f"Data/com.apple.CoreML/{name}" for name in
                              ("model.mlmodel", "weights/weight.bin")))  # fmt: skip
ON_DEVICE = {
    *(f"Model.mlpackage/{name}" for name in PACKAGE),
    *("tokenizer.json", "tokenizer_config.json", "config.json"),
}


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A recipe for a phone with iOS 18, and its bundle, judged by the interpreter."""
    folder = tmp_path_factory.mktemp("coreml")
    recipe = recipe_for(folder, tiny_llama)
    (folder / "pocket.toml").write_text(IOS)
    with jobs_at_hand("reference", "coreml"):
        done = run("export", "--config", recipe, "-q")
    assert done.code == 0, done.err
    return recipe, folder / "dist" / "pocket"


def test_the_bundle_is_whole_and_says_what_judged_it(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert manifest["container"] == "coreml" and manifest["profile"]["ios"] == 18
    assert manifest["judged"] and manifest["passed"]
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert ON_DEVICE <= listed.keys()
    assert report["footprint"]["device_bytes"] == sum(listed[name] for name in ON_DEVICE)
    assert report["footprint"]["kv_cache"] == "f16"
    assert {"coremltools", "protobuf"} <= manifest["tools"].keys()
    assert report["errors"]["file"]["codes_equal"] and report["errors"]["graph"]["kl_max"] < 1e-10
    assert 1e-7 < report["errors"]["runtime"]["kl_mean"] < 1e-5
    assert report["tokenizer"]["conforms"] and report["not_executed"] == manifest["not_executed"]
    measured = json.loads((folder / "report" / "measurements.json").read_text())
    assert measured["speed"] == []


@pytest.mark.skipif(coreml.EXECUTES, reason="Core ML executes it here")
def test_nothing_says_that_core_ml_ran_it(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["validated"] is False and manifest["executed"] == []
    said = "structure checked, not executed"
    assert any(said in words for words in manifest["not_executed"])
    pages = [folder / "README.md", *(folder / "report").glob("*")]
    assert len(pages) == 6
    for page in pages:
        assert "validated" not in page.read_text().lower(), page
    for name in ("summary.md", "report.html"):
        assert said in (folder / "report" / name).read_text()
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["runtime"].startswith("slimport's MIL interpreter with torch")
    assert f"Judged with {report['runtime']}" in (folder / "README.md").read_text()


def test_the_readme_has_code_for_swift(exported: tuple[Path, Path]) -> None:
    readme = (exported[1] / "README.md").read_text()
    assert "Needs **iOS 18** or the macOS of the same year (states" in readme
    assert "room for 64 tokens" in readme and "Core ML did not run it here" in readme
    code = readme.split("```swift")[2].split("```")[0]
    for name in ("inputIds", "fullAttentionMask", "slidingAttentionMask", "logits"):
        assert f'"{name}"' in code
    for call in ("model.makeState()", "using: state", ".cpuAndGPU", "$0 + 1"):
        assert call in code
    told = coreml.properties_of(exported[1] / "Model.mlpackage/Data/com.apple.CoreML/model.mlmodel")
    for key in ("slimport.context_length", "slimport.stop_tokens"):
        assert f'"{key}"' in code and key in told
    assert "$" not in readme.replace(code, "") and "$$" not in code
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")")


def test_verify_check_validate_and_the_forecast(exported: tuple[Path, Path], run: Run) -> None:
    recipe, folder = exported
    assert run("verify", folder).code == 0
    checked = run("check", folder, "--json")
    assert checked.code == 0 and len(checked.json["budgets"]) > 4
    done = run("export", "--config", recipe, "-q", "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}
    assert ON_DEVICE <= job["files"].keys()


def test_a_flipped_bit_does_not_verify(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[1], tmp_path / "copy"))
    file = folder / "Model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"weight\.bin"):
        pipeline.verify(folder)


def test_the_same_codes_for_android_and_in_gguf(
    exported: tuple[Path, Path], tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    """--container overrules the platform; what is written without a judge has the same bytes."""
    recipe = recipe_for(tmp_path, tiny_llama)  # its pocket is an android
    words = ("--no-validate", "-q", "--output")
    done = run("export", "--config", recipe, *CONTAINER, *words, tmp_path / "coreml")
    assert done.code == 0, done.err
    plain = tmp_path / "coreml" / "pocket"
    for name in ON_DEVICE:
        assert (plain / name).read_bytes() == (exported[1] / name).read_bytes(), name
    assert run("check", plain).code == 4
    done = run("export", "--config", recipe, "--container", "gguf", *words, tmp_path / "gguf")
    assert done.code == 0, done.err
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (exported[1], plain, tmp_path / "gguf" / "pocket")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("preset", ["nf4", "int2"])
def test_grids_that_iOS_18_lacks_are_refused(
    preset: str, exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    words = ("--target", "ios18-gpu", "--preset", preset, "--output", tmp_path / "new", "-q")
    done = run("export", "--config", exported[0], *words)
    assert done.code == 5, done.err
    lines = done.err.strip().splitlines()
    assert len(lines) == 3 and not done.out and not (tmp_path / "new").exists()
    assert "iOS 18 cannot decompress the grid" in lines[0] and "iOS 26" in lines[1]
    assert "--preset int4" in lines[2] and "--target ios26" in lines[2]
    cured = run("export", "--config", exported[0], "--target", "ios26", *words[2:], "--dry-run")
    assert cured.code == 0, cured.err


@pytest.mark.filterwarnings("ignore")  # peft warns about tied tables
def test_a_separate_adapter_is_a_function_beside_the_base(
    exported: tuple[Path, Path], tiny_llama: Path, make_adapter: Any, run: Run, tmp_path: Path
) -> None:
    """Over the same codes."""
    adapter = make_adapter(tiny_llama, tmp_path / "lora", 1, ["q_proj", "v_proj"])
    words = ("--adapter", f"tone={adapter}", "--adapter-mode", "separate", "--no-validate", "-q")
    done = run("export", "--config", exported[0], *words, "--output", tmp_path / "new")
    assert done.code == 0, done.err
    folder = tmp_path / "new" / "pocket"
    assert run("verify", folder).code == 0
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (exported[1], folder)
    }
    assert len(digests) == 1
    found = functions(folder / "Model.mlpackage")
    assert functions(exported[1] / "Model.mlpackage") == ["main"]
    assert len(found) == 2 and any("tone" in name for name in found)
