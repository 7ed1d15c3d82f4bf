"""Apple's Linux runtime as a judge, and a whole export for it from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slimport.errors import BadInput, Unsupported
from slimport.export import coreai as container
from slimport.export.coreai import sdk
from slimport.validation.runtimes import coreai as runtime

Run = Callable[..., Any]
installed = pytest.mark.skipif(
    find_spec("coreai_torch") is None, reason="the extra coreai is not installed"
)
POCKET = 'extends = "ios27"\ncontext_length = 64\nprompt_lengths = [16]\n'


def recipe(recipe_for: Run, folder: Path, model: Path) -> Path:
    path: Path = recipe_for(folder, model)
    (folder / "pocket.toml").write_text(POCKET)
    return path


@pytest.fixture(scope="module")
def bundle(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("coreai")
    done = run("export", "--config", recipe(recipe_for, folder, tiny_llama), "--json", "-q")
    assert done.code == 0, done.err
    return folder / "dist" / "pocket"


@pytest.mark.slow
@installed
def test_an_export_from_end_to_end(bundle: Path, run: Run) -> None:
    report = json.loads((bundle / "report/report.json").read_text())
    assert report["passed"] and report["container"] == "coreai"
    assert report["errors"]["graph"]["kl_max"] < 1e-8
    assert report["errors"]["runtime"]["kl_mean"] < 1e-8
    assert report["tokenizer"]["conforms"]
    assert report["footprint"]["kv_cache"] == "f32"
    assert any("no iPhone and no Mac" in words for words in report["not_executed"])
    assert any("a beta" in words for words in report["not_executed"])
    measured = json.loads((bundle / "report/measurements.json").read_text())
    assert measured["speed"] == []
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["profile"]["ios"] == 27
    assert "No device ran it" in (bundle / "README.md").read_text()
    assert run("verify", bundle).code == run("check", bundle).code == 0


@pytest.mark.slow
@installed
def test_the_greedy_tokens_are_those_of_golden(bundle: Path) -> None:
    golden = json.loads((bundle / "tokenizer/golden.json").read_text())
    first = golden["prompts"][0]
    (found,) = runtime.generate(bundle / container.FILE, [first["ids"]], 3)
    assert list(found.tokens) == first["greedy"][:3]


@pytest.mark.slow
@installed
def test_a_damaged_program_is_not_judged(bundle: Path, tmp_path: Path) -> None:
    """Apple's runtime would run it without a word."""
    folder = shutil.copytree(bundle, tmp_path / "copy")
    program = folder / container.FILE
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    with pytest.raises(BadInput, match=r"main\.hash"):
        runtime.generate(program, [[5, 6]], 1)


@pytest.mark.slow
@installed
def test_a_text_longer_than_the_states_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too long"):
        runtime.logits(bundle / container.FILE, np.zeros((1, 65), np.int32), tmp_path / "o.npy")


def fake(folder: Path, size: int) -> Path:
    """A program of which only the size is read, without its bytes."""
    program = folder / container.FILE
    program.parent.mkdir(parents=True)
    with program.open("wb") as file:
        file.truncate(size)
    told = {"context_length": "1024", "heads": "9", "states": "11520", "vocab_size": "49152"}
    notes = {f"slimport.{key}": value for key, value in (told | {"stop_tokens": "1"}).items()}
    (program.parent / "metadata.json").write_text(json.dumps({"creatorDefinedMetadata": notes}))
    return program


def test_effort_keeps_a_large_model_within_minutes(tmp_path: Path) -> None:
    """Of the size of 135 million parameters: a run 11.6 seconds, 512 tokens 32."""
    large = runtime.effort(fake(tmp_path / "large", 89_000_000))
    assert (large.length, large.tokens, large.generated) == (512, 3 * 512, 2)
    small = runtime.effort(fake(tmp_path / "small", 2_500_000))
    assert small.tokens >= 48 * 512 and small.generated > 20


def test_memory_is_predicted_from_the_file(tmp_path: Path) -> None:
    memory = runtime.measure(fake(tmp_path, 89_000_000), 1024).memory
    assert memory.mapped == memory.repacked == 89_000_000
    assert memory.kv_cache == 4 * 11520 * 1024
    assert memory.compute == 4 * 512 * (49152 + 2 * 9 * 1024)


def test_without_metadata_of_ours_it_is_bad_input(tmp_path: Path) -> None:
    program = fake(tmp_path, 1)
    (program.parent / "metadata.json").write_text('{"assetVersion": "2.0"}')
    with pytest.raises(BadInput, match="does not say what slimport writes"):
        runtime.effort(program)


def test_an_older_target_is_refused(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "version", sdk.VERSIONS.__getitem__)
    path = recipe_for(tmp_path, tiny_llama)
    done = run("export", "--config", path, "--target", "ios26", "--container", "coreai", "-q")
    assert done.code == 5 and "iOS 26 has no Core AI" in done.err


def test_without_the_extra_it_ends_with_its_command(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "version", lambda name: "0.1")
    done = run("export", "--config", recipe(recipe_for, tmp_path, tiny_llama), "-q")
    assert done.code == 6
    assert len(done.err.strip().splitlines()) == 3
    assert sdk.INSTALL in done.err
    rows = run("doctor", "--json").json["checks"]
    (row,) = (row for row in rows if row["name"] == "container coreai")
    assert row["ok"] and "optional" in row["found"] and row["cure"] == sdk.INSTALL


def test_it_takes_no_separate_adapter() -> None:
    adapter: Any = SimpleNamespace(name="tone")
    with pytest.raises(Unsupported, match="tone cannot stay separate"):
        container.refuse_adapter(adapter)
