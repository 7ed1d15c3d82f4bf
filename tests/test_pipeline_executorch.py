"""The verbs end to end with the ExecuTorch container."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle, pipeline
from slimport.errors import BadInput

Run = Callable[..., Any]
EXECUTORCH = ["--container", "executorch", "-q"]


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A recipe and its bundle, judged in ExecuTorch."""
    folder = tmp_path_factory.mktemp("executorch")
    recipe = recipe_for(folder, tiny_llama)
    with jobs_at_hand("reference", "executorch"):
        done = run("export", "--config", recipe, *EXECUTORCH)
    assert done.code == 0, done.err
    return recipe, folder / "dist" / "pocket"


def test_the_bundle_is_whole(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert manifest["container"] == "executorch" and "flatbuffers" in manifest["tools"]
    assert report["errors"]["file"]["codes_equal"] and "ExecuTorch" in report["runtime"]
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    names = {"model.pte", "tokenizer.json"}
    assert report["footprint"]["device_bytes"] == sum(listed[name] for name in names)
    readme = (folder / "README.md").read_text()
    assert "model.pte" in readme and "LlmModule" in readme and "$" not in readme.split("```")[0]
    golden = json.loads((folder / "tokenizer" / "golden.json").read_text())
    assert golden["prompts"]


def test_verify_check_and_the_forecast(exported: tuple[Path, Path], run: Run) -> None:
    recipe, folder = exported
    assert run("verify", folder).code == 0
    assert run("check", folder).code == 0
    done = run("export", "--config", recipe, *EXECUTORCH, "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_codes_are_those_of_the_gguf_bundle(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    words = ("--container", "gguf", "--no-validate", "-q", "--output", tmp_path)
    assert run("export", "--config", recipe, *words).code == 0
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (folder, tmp_path / "pocket")
    }
    assert len(digests) == 1


def test_equal_inputs_give_equal_bytes(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    words = (*EXECUTORCH, "--no-validate", "--output", tmp_path)
    assert run("export", "--config", recipe, *words).code == 0
    again = (tmp_path / "pocket" / "model.pte").read_bytes()
    assert again == (folder / "model.pte").read_bytes()


@pytest.mark.parametrize(
    "judged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["packed", "judged"]
)
@pytest.mark.filterwarnings("ignore")  # peft
def test_an_adapter_is_a_program_beside_the_weights_of_its_base(
    judged: bool,
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    tmp_path: Path,
    make_adapter: Any,
) -> None:
    make_adapter(tiny_llama, tmp_path / "lora", 1, ["q_proj", "down_proj"])
    words = ["--adapter", f"tone={tmp_path / 'lora'}", "--adapter-mode", "separate"]
    recipe = recipe_for(tmp_path, tiny_llama)
    given = ["--config", recipe, *EXECUTORCH, *words, "--output", tmp_path / "dist"]
    done = run("export", *given, *([] if judged else ["--no-validate"]))
    assert done.code == 0, done.err
    folder = tmp_path / "dist" / "pocket"
    if judged:
        report = json.loads((folder / "report" / "report.json").read_text())
        assert report["adapters"][0]["mode"] == "separate" and report["passed"]
        assert run("validate", folder, "--config", recipe, *words, "-q").code == 0
    assert (folder / "adapters" / "tone.pte").stat().st_size < 2 * 2**20
    readme = (folder / "README.md").read_text()
    assert 'TextLLMRunner("adapters/tone.pte", "tokenizer.json", "base_weights.ptd")' in readme
    assert run("verify", folder).code == 0
    (job,) = run("export", *given, "--dry-run", "--json").json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}
    content = bytearray((folder / "adapters" / "tone.pte").read_bytes())
    place = content.index(b"sha256:")
    content[place + 7 : place + 9] = b"zz"
    (folder / "adapters" / "tone.pte").write_bytes(content)
    with pytest.raises(BadInput, match=r"tone\.pte"):
        pipeline.verify(folder)


def test_a_flipped_bit_does_not_verify(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    content = bytearray((folder / "model.pte").read_bytes())
    content[-100] ^= 0x01
    (folder / "model.pte").write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.pte"):
        pipeline.verify(folder)
    with pytest.raises(BadInput):
        bundle.verify(folder)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--preset", "nf4"], 5, "ExecuTorch cannot multiply the grid nf4-g64"),
        (["--preset", "int2"], 5, "ExecuTorch cannot multiply the grid int2-g64"),
        (["--preset", "int4-signed"], 5, "ExecuTorch cannot multiply the grid int4-g32-signed"),
        (["--gguf-type", "Q4_K_M"], 5, "ExecuTorch cannot"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    words: list[str],
    code: int,
    said: str,
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    tmp_path: Path,
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    done = run("export", "--config", recipe, *EXECUTORCH, *words, "--output", tmp_path / "new")
    assert done.code == code and said in done.err, done.err
    assert not (tmp_path / "new").exists()
