"""The command line itself: exit codes, streams, precedence, signals; not what it computes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle

Run = Callable[..., Any]
SLIMPORT = [sys.executable, "-m", "slimport"]


def dry_run(run: Run, *arguments: object) -> Any:
    done = run("export", *arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    return done.json


# ---- streams ----


def test_every_json_output_names_its_schema(
    tiny_llama: Path, finished: Path, run: Run, tmp_path: Path
) -> None:
    """Each is the only thing on stdout, and no two have the same schema."""
    commands: list[list[object]] = [
        ["init", "--output", tmp_path / "new.toml"],
        ["targets"],
        ["doctor"],
        ["inspect", tiny_llama],
        ["inspect", finished / "model.gguf"],
        ["verify", finished],
        ["check", finished],
        ["export", tiny_llama, "--target", "android", "--dry-run"],
        ["quantize", tiny_llama, "--method", "rtn", "-o", tmp_path / "quantized"],
    ]
    schemas = []
    for command in commands:
        done = run(*command, "--json")
        assert done.code == 0, done.err
        schemas.append(done.json["schema"])
    assert all(schema.startswith("slimport.") and schema.endswith("/1") for schema in schemas)
    assert len(set(schemas)) == len(commands) - 1, schemas  # two of them are inspect


def test_json_and_tables_say_the_same(finished: Path, run: Run) -> None:
    rows = run("check", finished, "--json").json["budgets"]
    table = run("check", finished)
    assert table.code == 0 and table.err == ""
    for row in rows:
        assert row["metric"] in table.out
        assert row["ok"] is True
    assert {row["metric"]: row["source"] for row in rows}["kl_mean"] == "recipe"


def test_progress_is_on_stderr_only(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["export", tiny_llama, "--target", "android", "--method", "rtn", "--no-validate"]
    done = run(*arguments, "-o", tmp_path / "one", "--json")
    assert done.code == 0, done.err
    assert done.err.splitlines() == ["quantize", "packing gguf"]
    (shown,) = done.json["bundles"]
    assert shown["path"] == str(tmp_path / "one" / "android")
    assert shown["validated"] is False and "accuracy" not in shown
    quiet = run(*arguments, "-o", tmp_path / "two", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert "model.gguf" in quiet.out and "Not validated" in quiet.out


# ---- what each flag and variable means ----


def test_flags_over_environment_over_file_over_target(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grids(*flags: str) -> set[str]:
        found = dry_run(run, "--config", recipe, *flags)
        return {row["grid"] for row in found["grids"]}

    recipe = tmp_path / "slimport.toml"
    recipe.write_text(f'model = "{tiny_llama}"\ntargets = ["android"]\n')
    assert grids() == {"int4-g32", "int8-row"}  # the default
    recipe.write_text(recipe.read_text() + '[quantize]\npreset = "int8"\n')
    assert grids() == {"int8-row"}
    monkeypatch.setenv("SLIMPORT_PRESET", "int4-all")
    assert grids() == {"int4-g32"}
    assert grids("--preset", "int4-signed") == {"int4-g32-signed", "int8-row"}


def test_the_container_of_a_target_is_overridden(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.toml"
    own.write_text('extends = "android"\ncontainers = ["litertlm"]\n')
    arguments = ["export", tiny_llama, "--target", own, "--dry-run", "--json"]
    assert run(*arguments).code == 5  # not there yet
    assert run(*arguments, "--container", "gguf").json["jobs"][0]["container"] == "gguf"
    monkeypatch.setenv("SLIMPORT_CONTAINER", "gguf")
    assert run(*arguments).json["jobs"][0]["container"] == "gguf"
    assert run(*arguments, "--container", "litertlm").code == 5


def test_paths_of_a_recipe_start_from_its_folder(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "app" / "model")
    (tmp_path / "app" / "slimport.toml").write_text('model = "model"\ntargets = ["android"]\n')
    monkeypatch.chdir(tmp_path)
    done = run("export", "--config", "app/slimport.toml", "--method", "rtn", "--no-validate", "-q")
    assert done.code == 0, done.err
    assert bundle.verify(tmp_path / "app" / "dist" / "android")["name"] == "model"


def test_patterns_of_the_command_line(tiny_llama: Path, run: Run) -> None:
    wanted = {"0.mlp.gate": "int8-row", "0.mlp.up": None, "1.mlp.up": "int8-row"}
    wanted["1.self_attn.q"] = "int4-g32"
    found = run(
        "inspect",
        tiny_llama,
        "--grid",
        "*.mlp.*=int8-row",
        "--grid",
        "*.0.mlp.up*=float16",
        "--json",
    ).json["plan"]["weights"]
    grids = {name: found[f"model.layers.{name}_proj.weight"]["grid"] for name in wanted}
    assert grids == wanted


# ---- the small commands ----


def test_init_writes_a_recipe_that_loads_and_never_overwrites(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "--model", tiny_llama).code == 0
    written = (tmp_path / "slimport.toml").read_text()
    assert tomllib.loads(written)["model"] == str(tiny_llama)
    assert dry_run(run)["jobs"][0]["target"] == "android"
    again = run("init")
    assert again.code == 2 and "never overwrites" in again.err
    assert (tmp_path / "slimport.toml").read_text() == written


def test_init_where_nothing_can_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "absent" / "slimport.toml", tmp_path / "file" / "slimport.toml"):
        done = run("init", "--output", output)
        assert done.code == 8 and "cannot be written" in done.err


def test_targets_lists_every_profile(run: Run) -> None:
    found = run("targets", "--json").json["targets"]
    qnn = ["android-qnn", "android-qnn-v75", "android-qnn-v79", "android-qnn-v81"]
    assert [target["name"] for target in found] == [
        "android",
        "android-gpu",
        "android-onnx-gpu",
        *qnn,
        "galaxy-s24",
        *("ios", "ios18-ane", "ios18-gpu", "ios26", "ios27"),
    ]
    assert all(limit["source"] for target in found for limit in target["budgets"].values())
    assert "Samsung Galaxy S24" in run("targets").out


def test_doctor_names_what_is_missing_and_its_cure(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("doctor").code == 0
    (tmp_path / "peft.py").write_text("raise ImportError('no such thing')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    done = run("doctor", "--json")
    assert done.code == 6
    (missing,) = (row for row in done.json["checks"] if not row["ok"])
    assert missing["name"] == "peft" and missing["cure"].startswith("pip install")
    assert "MISSING" in run("doctor").out


def test_help_of_every_command_has_an_example_or_says_what_it_does(run: Run) -> None:
    overview = run("--help").out
    for command in "export inspect quantize validate check verify targets doctor init".split():
        assert f"  {command} " in overview
        assert run(command, "--help").code == 0


# ---- signals and pipes: real processes ----


@pytest.mark.parametrize("arguments", [["targets"], ["targets", "--json"], ["--help"]])
def test_a_closed_pipe_is_141(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SLIMPORT, *arguments], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("number", "code", "stage", "text", "many"),
    [
        (
            signal.SIGTERM,
            143,
            "quantize",
            "train.txt",
            {"SLIMPORT_METHOD": "gptq", "SLIMPORT_CALIBRATION_WINDOWS": "3000"},
        ),
        (
            signal.SIGINT,
            130,
            "judging: oracle, held out",
            "held_out.txt",
            {"SLIMPORT_WINDOWS": "500"},
        ),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_leaves_the_old_bundle_and_nothing_else(
    number: signal.Signals, code: int, stage: str, text: str, many: dict[str, str],
    finished: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """In the middle of calibrated quantizing, and while a child process judges."""
    app = shutil.copytree(finished.parents[1], tmp_path / "app")
    (app / text).write_text("The fox went home. " * 20_000)
    before = (app / "dist/pocket/manifest.json").read_bytes()
    command = [*SLIMPORT, "export", "--config", str(app / "slimport.toml")]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | many
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if lines[-1] == stage:
                process.send_signal(number)
    assert process.returncode == code, lines
    assert not any("error" in line.lower() for line in lines), lines  # it was asked to stop
    assert (app / "dist/pocket/manifest.json").read_bytes() == before
    bundle.verify(app / "dist/pocket")
    names = [path.name for path in (app / "dist").iterdir()]
    assert [name for name in names if not name.endswith("lock")] == ["pocket"]


def test_the_module_is_the_command() -> None:
    done = subprocess.run([*SLIMPORT, "targets", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["schema"] == "slimport.targets/1"
