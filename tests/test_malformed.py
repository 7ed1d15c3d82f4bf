"""A corpus of what users and strangers get wrong: each with its exit code and its three lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slimport import bundle
from slimport.quantize import ggml

Run = Callable[..., Any]
Damage = Callable[[Path], Any]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def refused(done: Any, code: int, words: str, output: Path | None = None) -> None:
    """The exit code, three lines on stderr and nothing else, and no trace in `output`."""
    assert done.code == code, done.err
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "why", "do"], done.err
    assert all(line.partition(":")[2].strip() for line in lines), done.err
    assert words in done.err
    assert done.out == ""
    assert "internal error" not in done.err and "Traceback" not in done.err
    assert output is None or left_in(output) == []


def left_in(output: Path) -> list[str]:
    """Everything in a folder for bundles but the lock files, which stay."""
    found = [path.name for path in output.iterdir()] if output.exists() else []
    return [name for name in found if not name.endswith("lock")]


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def apply(model: Path) -> None:
        table = json.loads((model / name).read_text())
        change(table)
        (model / name).write_text(json.dumps(table))

    return apply


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    def apply(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return apply


def cut(name: str, count: int) -> Damage:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size - count)


def shards(target: str) -> Damage:
    """An index in place of the single file, whose tensors lie in `target`."""

    def apply(model: Path) -> None:
        names = load_file(model / WEIGHTS)
        (model / WEIGHTS).unlink()
        index = {"weight_map": dict.fromkeys(names, target)}
        (model / INDEX).write_text(json.dumps(index))

    return apply


def nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[QUERY][3, 5] = np.nan


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"][0] = np.inf


def wider(tensors: dict[str, np.ndarray]) -> None:
    tensors[QUERY] = np.zeros((64, 96), np.float32)


def pointer(model: Path) -> None:
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def pickle_only(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def link_out(model: Path) -> None:
    shutil.move(model / WEIGHTS, model.parent / "elsewhere")
    (model / WEIGHTS).symlink_to(model.parent / "elsewhere")


# name -> damage done to a model's folder, exit code, words of the message
MODELS: dict[str, tuple[Damage, int, str]] = {
    "unknown family": (
        edit_json("config.json", lambda c: c.update(model_type="mamba")),
        5,
        "mamba",
    ),
    "a key that changes the mathematics": (
        edit_json("config.json", lambda c: c.update(attn_logit_softcapping=50.0)),
        5,
        "attn_logit_softcapping",
    ),
    "another activation": (
        edit_json("config.json", lambda c: c.update(hidden_act="gelu")),
        5,
        "gelu",
    ),
    "already quantized": (
        edit_json("config.json", lambda c: c.update(quantization_config={"bits": 4})),
        5,
        "quantization_config",
    ),
    "no config.json": (lambda m: (m / "config.json").unlink(), 7, "config.json"),
    "config.json cut": (cut("config.json", 20), 7, "config.json is not JSON"),
    "config.json a list": (lambda m: (m / "config.json").write_text("[]"), 7, "not a JSON object"),
    "a size missing": (edit_json("config.json", lambda c: c.pop("hidden_size")), 7, "hidden_size"),
    "pickle only": (pickle_only, 7, "pickle"),
    "no weights": (lambda m: (m / WEIGHTS).unlink(), 7, "has no weights"),
    "Git-LFS pointer": (pointer, 7, "git lfs pull"),
    "weights truncated": (cut(WEIGHTS, 1000), 7, "is damaged"),
    "weights of no bytes": (lambda m: os.truncate(m / WEIGHTS, 0), 7, "is damaged"),
    "a giant header": (lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 99), 7, "is damaged"),
    "NaN": (edit_tensors(nan), 7, f"{QUERY} in {WEIGHTS} has 1 values"),
    "infinity": (edit_tensors(infinite), 7, "model.norm.weight"),
    "a tensor of another shape": (edit_tensors(wider), 7, QUERY),
    "a tensor missing": (edit_tensors(lambda t: t.pop(QUERY)), 7, QUERY),
    "a tensor too many": (edit_tensors(lambda t: t.update(odd=np.ones(3, "f4"))), 7, "odd"),
    "integer weights": (
        edit_tensors(lambda t: t.update({QUERY: np.zeros((64, 64), np.int8)})),
        7,
        "dtype I8",
    ),
    "shard missing": (shards("model-00001-of-00001.safetensors"), 7, "is missing"),
    "path traversal": (shards("../elsewhere.safetensors"), 7, "../elsewhere.safetensors"),
    "absolute path": (shards("/etc/passwd.safetensors"), 7, "unsafe"),
    "a link out of the folder": (link_out, 7, "link out of the model's folder"),
    "no tokenizer.json": (lambda m: (m / "tokenizer.json").unlink(), 7, "tokenizer.json"),
    "tokenizer.json cut": (cut("tokenizer.json", 100), 7, "tokenizer.json"),
    "tokenizer.json of something else": (
        lambda m: (m / "tokenizer.json").write_text('{"version": "1.0"}'),
        7,
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    damage, code, words = MODELS[name]
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    damage(model)
    done = run(
        "export", model, "--target", "android", "--method", "rtn", "--no-validate",
        "-q", "-o", tmp_path / "dist",
    )  # fmt: skip
    refused(done, code, words, tmp_path / "dist")


def test_a_chat_template_that_does_not_parse(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for %}")
    done = run("export", "--config", recipe_for(tmp_path, model), "-q")
    refused(done, 7, "chat template", tmp_path / "dist")


# name -> what is put before, and after, the usual recipe; exit code; words of the message
RECIPES: dict[str, tuple[str, str, int, str]] = {
    "unknown key": ('modle = "x"', "", 2, "modle"),
    "unknown key of a section": ("", "windws = 3", 2, "windws"),
    "another type": ("version = 1.0", "", 2, "version"),
    "not TOML": ("model == x", "", 2, "slimport.toml"),
    "a text that is not there": ("", '[texts]\neval = "absent.txt"', 2, "absent.txt"),
    "a hopeless size": ("", '[budgets]\nmodel_bytes = "4 parsecs"', 2, "4 parsecs"),
    "unknown target": ('targets = ["pixel-99"]', "", 2, "pixel-99"),
    "no target": ("", "", 2, "no target"),
    "container not there yet": ('targets = ["android"]\ncontainer = "litertlm"', "", 5, "gguf"),
    "unknown preset": ('targets = ["android"]', '[quantize]\npreset = "int5"', 2, "int5"),
    "unknown method": ('targets = ["android"]', '[quantize]\nmethod = "magic"', 2, "magic"),
    "unknown grid": ('targets = ["android"]', '[quantize.patterns]\n"*" = "int5"', 2, "int5"),
    "a pattern of no weight": (
        'targets = ["android"]',
        '[quantize.patterns]\n"decoder.*" = "float16"',
        2,
        "decoder.*",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    before, after, code, words = RECIPES[name]
    recipe = tmp_path / "slimport.toml"
    recipe.write_text(f'{before}\nmodel = "{tiny_llama}"\n{after}\n')
    done = run("export", "--config", recipe, "--no-validate", "-q")
    refused(done, code, words, tmp_path / "dist")


COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "no model and no slimport.toml": (["export", "--target", "android"], 2, "slimport init"),
    "a path that is not there": (["export", "./absent", "--target", "android"], 2, "absent"),
    "a name that is no hub id": (["export", "a/b/c", "--target", "android"], 2, "a/b/c"),
    "a hub id without a network": (["export", "no/such", "--offline"], 8, "no/such"),
    "a config that is not there": (["export", "--config", "absent.toml"], 2, "absent.toml"),
    "an unknown flag": (["export", "--fast"], 2, "--fast"),
    "an unknown command": (["exprot"], 2, "exprot"),
    "an adapter without a name": (["export", "a/b", "--adapter", "./lora"], 2, "NAME=PATH"),
    "a grid without a pattern": (["export", "a/b", "--grid", "int8-row"], 2, "PATTERN=GRID"),
    "a bundle that is not there": (["verify", "absent"], 2, "absent"),
    "a bundle to check that is not there": (["check", "absent"], 2, "absent"),
    "a GGUF file that is not there": (["inspect", "./absent.gguf"], 2, "absent.gguf"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, code, words = COMMANDS[name]
    refused(run(*arguments), code, words)
    assert list(tmp_path.iterdir()) == []


# ---- texts ----

TEXTS: dict[str, tuple[str, bytes, int, str]] = {
    "too short": ("held_out.txt", b"too short", 7, "one window of 32 tokens"),
    "empty": ("held_out.txt", b"", 7, "one window of 32 tokens"),
    "not UTF-8": ("held_out.txt", b"caf\xe9 " * 999, 7, "not UTF-8"),
    "calibration too short": ("train.txt", b"too short", 7, "one window of 32 tokens"),
    "JSONL of something else": ("held_out.jsonl", b'{"words": 3}\n', 7, "line 1"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str, tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path) -> None:
    file, content, code, words = TEXTS[name]
    recipe = recipe_for(tmp_path, tiny_llama)
    (tmp_path / file).write_bytes(content)
    more = ["--eval", tmp_path / file] if file.startswith("held_out") else ["--method", "gptq"]
    refused(run("export", "--config", recipe, "-q", *more), code, words, tmp_path / "dist")


# ---- adapters ----


def lora(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A LoRA of rank 2 on one matrix (64, 64)."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["layers.0.self_attn.q_proj"],
    }
    stem = f"base_model.model.{QUERY.removesuffix('.weight')}"
    factors = {"A": np.full((2, 64), 0.1, np.float32), "B": np.full((64, 2), 0.1, np.float32)}
    return config, {f"{stem}.lora_{half}.weight": value for half, value in factors.items()}


Lora = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
ADAPTERS: dict[str, tuple[Lora, int, str]] = {
    "left over": (lambda c, t: t.update(odd=np.ones(3, "f4")), 7, "odd"),
    "half missing": (lambda c, t: t.pop(next(iter(t))), 7, "file is incomplete"),
    "of another size": (
        lambda c, t: t.update({name: np.ones((2, 48), "f4") for name in t if "lora_A" in name}),
        7,
        "lora_A",
    ),
    "NaN": (lambda c, t: t.update({name: value * np.nan for name, value in t.items()}), 7, "NaN"),
    "another kind": (lambda c, t: c.update(peft_type="IA3"), 5, "IA3"),
    "a reward model": (lambda c, t: c.update(task_type="SEQ_CLS"), 7, "score.weight"),
    "not an adapter": (lambda c, t: c.pop("peft_type"), 7, "peft_type"),
    "moves the base": (lambda c, t: c.update(init_lora_weights="pissa"), 5, "pissa"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str, tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    change, code, words = ADAPTERS[name]
    config, tensors = lora(tmp_path / "lora")
    change(config, tensors)
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    done = run(
        "export", tiny_llama, "--adapter", f"support={tmp_path / 'lora'}", "--target", "android",
        "--method", "rtn", "--no-validate", "-q", "-o", tmp_path / "dist",
    )  # fmt: skip
    refused(done, code, words, tmp_path / "dist")


def test_two_adapters_are_not_merged(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    arguments = []
    for name in ("one", "two"):
        config, tensors = lora(tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        arguments += ["--adapter", f"{name}={tmp_path / name}"]
    done = run(
        "export", tiny_llama, *arguments, "--target", "android", "-q", "-o", tmp_path / "dist"
    )
    refused(done, 5, "one, two", tmp_path / "dist")


# ---- the machine, the output, a finished bundle ----


def test_an_output_that_is_not_ours(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "dist" / "android"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("years of work")
    done = run(
        "export", tiny_llama, "--target", "android", "--method", "rtn", "--no-validate", "-q",
        "-o", tmp_path / "dist",
    )  # fmt: skip
    refused(done, 2, "not replaced")
    assert left_in(tmp_path / "dist") == ["android"]
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_an_output_below_a_file(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(
        "export", tiny_llama, "--target", "android", "--no-validate", "-q",
        "-o", tmp_path / "file" / "dist",
    )  # fmt: skip
    refused(done, 8, "cannot be written")


def test_a_full_disk(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(bundle, "_sync", full)
    done = run(
        "export", tiny_llama, "--target", "android", "--method", "rtn", "--no-validate", "-q",
        "-o", tmp_path / "dist",
    )  # fmt: skip
    refused(done, 8, "free some space", tmp_path / "dist")


def test_another_release_of_xllamacpp(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml.metadata, "version", lambda name: "1999.1.1")
    ggml.library.cache_clear()
    done = run(
        "export", tiny_llama, "--target", "android", "--method", "rtn", "--no-validate", "-q",
        "-o", tmp_path / "dist",
    )  # fmt: skip
    refused(done, 6, "1999.1.1", tmp_path / "dist")
    assert f"pip install xllamacpp=={ggml.RELEASE}" in done.err


def test_a_bundle_that_was_tampered_with(finished: Path, run: Run, tmp_path: Path) -> None:
    bundle_folder = shutil.copytree(finished, tmp_path / "pocket")
    with (bundle_folder / "model.gguf").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    refused(run("verify", bundle_folder), 7, "model.gguf")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "{"),
        ("report/report.json", "{"),
        ("report/report.json", "[]"),
        ("report/report.json", "{}"),
    ],
)
def test_check_of_a_damaged_bundle(
    file: str, content: str, finished: Path, run: Run, tmp_path: Path
) -> None:
    bundle_folder = shutil.copytree(finished, tmp_path / "pocket")
    (bundle_folder / file).write_text(content)
    refused(run("check", bundle_folder), 7, file.rpartition("/")[2])


def test_check_of_a_bundle_that_was_not_validated(
    tiny_llama: Path, run: Run, tmp_path: Path
) -> None:
    done = run(
        "export", tiny_llama, "--target", "android", "--method", "rtn", "--no-validate", "-q",
        "-o", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    refused(run("check", tmp_path / "android"), 4, "--no-validate")


@pytest.mark.parametrize(
    ("budgets", "code", "words"),
    [("model_bytes = 1000", 3, "model_bytes is"), ("ppl_ratio = 0.01", 4, "ppl_ratio is")],
)
def test_a_broken_budget_keeps_the_bundle_apart(
    budgets: str, code: int, words: str, tiny_llama: Path, recipe_for: Run, run: Run,
    tmp_path: Path, at_hand: None,
) -> None:  # fmt: skip
    recipe = recipe_for(tmp_path, tiny_llama)
    recipe.write_text(recipe.read_text() + budgets)
    refused(run("export", "--config", recipe, "-q"), code, words)
    assert left_in(tmp_path / "dist") == ["pocket.failed"]
    failed = tmp_path / "dist" / "pocket.failed"
    assert bundle.verify(failed)["passed"] is False
    done = run("check", failed)
    assert done.code == 3
    assert "BROKEN" in done.out


def test_an_error_inside_is_said_to_be_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimport import inspection

    def broken() -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(inspection, "doctor", broken)
    done = run("doctor")
    assert done.code == 1
    assert done.err.splitlines()[:2] == ["error: internal error", "why: ZeroDivisionError: oh no"]
    assert len(done.err.splitlines()) == 3
    assert "Traceback" in run("doctor", "--debug").err
