"""The verbs end to end with the ONNX container."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle, pipeline
from slimport.errors import BadInput
from slimport.export import onnx_fp16
from slimport.export.onnx.reader import DATA
from slimport.recipe import load
from slimport.validation.runtimes import onnxruntime

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables

Run = Callable[..., Any]
ONNX = ["--container", "onnx", "-q"]


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    make_adapter: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A recipe and its bundle: a base with two separate adapters, judged in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("onnx")
    recipe = recipe_for(folder, tiny_llama, more='adapter_mode = "separate"\n')
    first = make_adapter(tiny_llama, folder / "first", 1, ["q_proj", "v_proj"])
    second = make_adapter(tiny_llama, folder / "second", 2, ["down_proj"])
    with jobs_at_hand("reference", "onnxruntime"):
        done = run(
            *("export", "--config", recipe, *ONNX),
            *("--adapter", f"first={first}", "--adapter", f"second={second}"),
        )
    assert done.code == 0, done.err
    return recipe, folder / "dist" / "pocket"


def flags(recipe: Path) -> list[str]:
    names = ("first", "second")
    pairs = [("--adapter", f"{name}={recipe.parent / name}") for name in names]
    return [word for pair in pairs for word in pair]


def test_the_bundle_is_whole(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert manifest["container"] == "onnx" and manifest["profile"]["kv_cache"] == "f32"
    assert manifest["minimum_runtime"]["runtime"] == "onnxruntime-genai"
    assert {"onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"} <= manifest["tools"].keys()
    assert "xllamacpp" not in manifest["tools"]
    assert manifest["session_options"] == onnxruntime.SESSION
    assert report["errors"]["file"]["codes_equal"] and report["errors"]["graph"]["kl_max"] < 1e-9
    assert report["footprint"]["predicted"]["keys"] == [
        f"memory.{part}" for part in ("mapped", "repacked", "kv_cache", "compute")
    ]
    assert any("only first was judged" in words for words in report["not_executed"])
    names = {"model.onnx", DATA, "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    adapters = {f"adapters/{name}.onnx_adapter" for name in ("first", "second")}
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert names | adapters <= listed.keys()
    device = sum(listed[name] for name in names | adapters)
    assert report["footprint"]["device_bytes"] == device
    assert "setActiveAdapter" in (folder / "README.md").read_text()
    assert not {path for path in folder.rglob("*") if path.is_symlink()}


def test_the_dry_run_predicts_every_byte(exported: tuple[Path, Path], run: Run) -> None:
    recipe, folder = exported
    done = run("export", "--config", recipe, *ONNX, *flags(recipe), "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_codes_are_those_of_the_gguf_bundle(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    done = run("export", "--config", recipe, "--no-validate", "-q", "--output", tmp_path)
    assert done.code == 0, done.err
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (folder, tmp_path / "pocket")
    }
    assert len(digests) == 1


def test_verify_and_validate(exported: tuple[Path, Path], run: Run, jobs_at_hand: Any) -> None:
    recipe, folder = exported
    assert run("verify", folder).code == 0
    with jobs_at_hand("reference", "onnxruntime"):
        done = run("validate", folder, "--config", recipe, *flags(recipe), "--json", "-q")
    assert done.code == 0, done.err
    stated = json.loads((folder / "report" / "report.json").read_text())
    assert done.json["accuracy"] == stated["accuracy"]


@pytest.mark.parametrize("file", ["model.onnx", DATA, "adapters/second.onnx_adapter"])
def test_a_changed_byte_is_found(file: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 0x01
    (folder / file).write_bytes(content)
    with pytest.raises(BadInput, match=file.rpartition("/")[2]):
        pipeline.verify(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:  # somebody who mends the manifest, too
        if entry["path"] == file:
            entry["sha256"] = bundle.sha256(folder / file)
    (folder / "manifest.json").write_bytes(bundle.canonical_json(manifest))
    with pytest.raises(BadInput):
        pipeline.verify(folder)


def test_an_adapter_of_another_base_does_not_verify(
    exported: tuple[Path, Path],
    recipe_for: Run,
    make_model: Run,
    run: Run,
    make_adapter: Run,
    tmp_path: Path,
) -> None:
    folder = exported[1]
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = make_model("llama", seed=7)
    make_adapter(other, tmp_path / "first", 1, ["q_proj", "v_proj"])
    made = recipe_for(tmp_path / "other", other, more='adapter_mode = "separate"\n')
    words = ("--adapter", f"first={tmp_path / 'first'}", "--no-validate")
    done = run("export", "--config", made, *ONNX, *words)
    assert done.code == 0, done.err
    foreign = tmp_path / "other" / "dist" / "pocket" / "adapters" / "first.onnx_adapter"
    place = copy / "adapters" / "first.onnx_adapter"
    shutil.copyfile(foreign, place)
    manifest = bundle.read_manifest(copy)
    for entry in manifest["files"]:
        if entry["path"] == "adapters/first.onnx_adapter":
            entry |= {"sha256": bundle.sha256(place), "bytes": place.stat().st_size}
    (copy / "manifest.json").write_bytes(bundle.canonical_json(manifest))
    with pytest.raises(BadInput):
        pipeline.verify(copy)


def test_two_exports_have_the_same_bytes(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    words = ("--no-validate", "--output", tmp_path)
    assert run("export", "--config", recipe, *ONNX, *flags(recipe), *words).code == 0
    for path in (tmp_path / "pocket").rglob("*"):
        name = path.relative_to(tmp_path / "pocket")
        if path.is_file() and name.name not in ("manifest.json", "README.md"):
            assert path.read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
def test_the_float16_bundle_has_the_same_codes_and_names_no_gpu(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    recipe, folder = exported
    words = ("export", "--config", recipe, "--container", "onnx-fp16", "-q", "--output", tmp_path)
    words += ("--adapter", f"first={recipe.parent / 'first'}")
    predicted = run(*words, "--dry-run", "--json").json["jobs"][0]["files"]
    done = run(*words)
    assert done.code == 0, done.err
    made = tmp_path / "pocket"
    assert predicted == {name: (made / name).stat().st_size for name in predicted}
    manifest = json.loads((made / "manifest.json").read_text())
    report = json.loads((made / "report" / "report.json").read_text())
    base = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights_digest"] == base["weights_digest"]
    assert manifest["container"] == "onnx-fp16" and manifest["profile"]["kv_cache"] == "f16"
    assert report["errors"]["graph"]["kl_max"] < 1e-5  # an adapter's factors are rounded
    assert report["footprint"]["memory"]["kv_cache"] == 2 * 2 * 2 * 16 * 64 * 2
    assert any("no GPU executed" in words for words in manifest["not_executed"])
    assert any("no GPU executed" in words for words in manifest["notes"])
    assert "append_provider" in (made / "README.md").read_text()
    assert run("verify", made).code == 0
    place = made / "adapters" / "first.onnx_adapter"
    with pytest.raises(BadInput, match="not an adapter of this base"):
        onnx_fp16.refuse_foreign_adapter(folder / "adapters" / place.name, base["weights_digest"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--preset", "Q4_K_M"], "ONNX cannot hold the grid"),
        (["--grid", "model.embed_tokens.weight=nf4-g64"], "ONNX cannot hold the grid nf4-g64"),
        (["--container", "tflite"], "is not there yet"),
    ],
)
def test_refusals_come_before_any_work(
    words: list[str], why: str, recipe_for: Run, make_model: Run, run: Run, tmp_path: Path
) -> None:
    model = make_model("llama", hidden_size=256, num_attention_heads=16)
    recipe = recipe_for(tmp_path, model)
    done = run("export", "--config", recipe, *ONNX, *words)
    assert done.code == 5 and why in done.err
    assert len(done.err.strip().splitlines()) == 3
    assert not (tmp_path / "dist").exists()


def test_the_api_takes_the_container_of_the_recipe(
    tiny_llama: Path, recipe_for: Run, tmp_path: Path
) -> None:
    recipe = load(recipe_for(tmp_path, tiny_llama, more='container = "onnx"\n'))
    (folder,) = pipeline.export(recipe, validate=False)
    assert (folder / "model.onnx").is_file()
