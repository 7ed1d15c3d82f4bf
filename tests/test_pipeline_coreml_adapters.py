"""Separate adapters end to end in both containers of Core ML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import pipeline
from slimport.errors import BadInput
from slimport.export.coreml.package import paths

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

Run = Callable[..., Any]
TARGETS = {"coreml": "ios18-gpu", "coreml-ane": "ios18-ane"}
FUNCTIONS = {"coreml": "", "coreml-ane": " behind `decode_` or `prefill_`"}
POCKET = """\
extends = "{target}"
context_length = 64
prompt_lengths = [16, 32]
"""


@pytest.fixture(scope="module")
def words(
    tiny_llama: Path, make_adapter: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two adapters, one of them at half its strength."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_llama, folder / "tone", 1, ["q_proj", "down_proj"])
    make_adapter(tiny_llama, folder / "b-c", 2, ["v_proj"])
    given = [f"tone={folder / 'tone'}:0.5", f"b-c={folder / 'b-c'}"]
    return ["--adapter-mode", "separate", "--adapter", given[0], "--adapter", given[1]]


@pytest.fixture(scope="module", params=TARGETS)
def packed(
    request: pytest.FixtureRequest,
    words: list[str],
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Any], Path]:
    """What was given, and a bundle of it that was not judged."""
    folder = tmp_path_factory.mktemp("packed")
    recipe = recipe_for(folder, tiny_llama)
    (folder / "pocket.toml").write_text(POCKET.format(target=TARGETS[request.param]))
    given = ["--config", recipe, "-q", "--preset", "int8", *words]
    done = run("export", *given, "--no-validate")
    assert done.code == 0, done.err
    return given, folder / "dist" / "pocket"


def container_of(folder: Path) -> str:
    found: str = json.loads((folder / "manifest.json").read_text())["container"]
    return found


def test_the_bundle_has_a_function_for_each(packed: tuple[list[Any], Path], run: Run) -> None:
    given, folder = packed
    for name, function in (("tone", "with_tone"), ("b-c", "with_b_c")):
        told = json.loads((folder / "adapters" / f"{name}.json").read_text())
        assert told["function"] == function
    readme = (folder / "README.md").read_text()
    assert "`adapters/tone.json` | the function of an adapter" in readme
    assert "`adapters/b-c.json`" in readme
    assert f"`settings.functionName` to that name{FUNCTIONS[container_of(folder)]}." in readme
    assert run("verify", folder).code == 0
    (job,) = run("export", *given, "--dry-run", "--json").json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}
    assert {"adapters/tone.json", "adapters/b-c.json", paths().weights} <= job["files"].keys()


def test_codes_are_those_of_gguf(packed: tuple[list[Any], Path], run: Run, tmp_path: Path) -> None:
    given, folder = packed
    plain = given[: given.index("--adapter-mode")]
    done = run("export", *plain, "--container", "gguf", "--no-validate", "-o", tmp_path)
    assert done.code == 0, done.err
    digests = {
        json.loads((place / "manifest.json").read_text())["weights_digest"]
        for place in (folder, tmp_path / "pocket")
    }
    assert len(digests) == 1


def test_an_adapter_of_another_base_does_not_verify(
    packed: tuple[list[Any], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(packed[1], tmp_path / "copy")
    tone = folder / "adapters" / "tone.json"
    told = json.loads(tone.read_text())
    tone.write_text(json.dumps(told | {"weights_digest": "sha256:" + "1" * 64}))
    with pytest.raises(BadInput, match=r"tone\.json"):
        pipeline.verify(folder)


def test_names_of_one_function_are_refused(
    packed: tuple[list[Any], Path], words: list[str], run: Run, tmp_path: Path
) -> None:
    given, _ = packed
    again = words[-1].replace("b-c=", "b_c=")
    done = run("export", *given, "--adapter", again, "--no-validate", "-o", tmp_path / "out")
    assert done.code == 5 and "two adapters would be the function with_b_c" in done.err
    assert len(done.err.strip().splitlines()) == 3 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_adapter_is_judged(
    packed: tuple[list[Any], Path], run: Run, jobs_at_hand: Any, tmp_path: Path
) -> None:
    given, _ = packed
    with jobs_at_hand("reference"):
        done = run("export", *given, "--output", tmp_path)
    assert done.code == 0, done.err
    folder = tmp_path / "pocket"
    report = json.loads((folder / "report" / "report.json").read_text())
    assert [each["mode"] for each in report["adapters"]] == ["separate"] * 2 and report["passed"]
    assert report["errors"]["file"]["codes_equal"]
    assert run("verify", folder).code == 0 and run("check", folder).code == 0
    done = run("validate", folder, *given[: given.index("--preset")], *given[-6:])
    assert done.code == 0, done.err
