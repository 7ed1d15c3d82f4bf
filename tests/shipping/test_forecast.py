"""A dry run: exact bytes, the same refusals, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slimport.architectures import decoder_config
from slimport.quantize.plan import make_plan
from slimport.quantize.windows import IN_MEMORY
from slimport.recipe import load
from slimport.shipping import forecast

Run = Callable[..., Any]
LARGE = {"hidden_size": 2048, "intermediate_size": 5632}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of rank 2 on one matrix (64, 64)."""
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["0.self_attn.q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {"A": (2, 64), "B": (64, 2)}
    factors = {f"{stem}{half}.weight": np.ones(s, np.float32) for half, s in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("mode", [None, "merged", "separate"])
@pytest.mark.parametrize(("family", "tokenizer"), [("llama", "spm"), ("qwen3", None)])
def test_predicted_bytes_are_the_bytes(
    family: str, tokenizer: str | None, mode: str | None, make_model: Run, lora: Path, run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = make_model(family, tokenizer=tokenizer, hidden_size=64, num_attention_heads=2)
    command = ["export", model, "--target", "android", "--method", "rtn", "-q", "--json"]
    if mode:
        command += ["--adapter", f"support={lora}", "--adapter-mode", mode]
    command += ["-o", tmp_path / "dist"]
    predicted = run(*command, "--dry-run")
    assert predicted.code == 0, predicted.err
    assert not (tmp_path / "dist").exists()
    done = run(*command, "--no-validate")
    assert done.code == 0, done.err
    (job,) = predicted.json["jobs"]
    bundle = tmp_path / "dist" / "android"
    real = {p.relative_to(bundle).as_posix(): p.stat().st_size for p in bundle.rglob("*.gguf")}
    assert job["files"] == real
    assert len(real) == (2 if mode == "separate" else 1)


def test_a_dry_run_shows_plan_and_predictions(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    command = ["export", tiny_llama, "--target", "android", "--target", "galaxy-s24", "--dry-run"]
    found = run(*command, "-o", tmp_path / "dist", "--json").json
    assert [job["target"] for job in found["jobs"]] == ["android", "galaxy-s24"]
    rows = {(row["grid"], row["method"]): row for row in found["grids"]}
    linears = rows["int4-g32", "gptq"]
    assert linears["weights"] == 2 * 7
    per_layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    assert linears["bytes"] == 2 * per_layer * 18 / 32  # 16 bytes of codes and a float16 scale
    assert found["memory"] > 0 and found["seconds"] > 0
    assert found["disk"] > sum(sum(job["files"].values()) for job in found["jobs"])
    shown = run(*command, "-o", tmp_path / "dist")
    assert shown.code == 0
    for words in ("int4-g32", "gptq", "model.gguf", "galaxy-s24", "free disk"):
        assert words in shown.out


def test_activations_lie_in_memory_up_to_a_limit_and_then_on_disk(
    tiny_llama: Path, recipe_for: Run, tmp_path: Path
) -> None:
    recipe = load(recipe_for(tmp_path, tiny_llama)).override(method="gptq", window_length=16)

    def found(windows: int) -> tuple[int, int]:
        given = recipe.override(calibration_windows=windows, calibration_length=128)
        told = forecast.forecast(given)
        return told.memory, told.disk

    window = 128 * 64 * 8  # two streams of float32 by 64 hidden features
    most = IN_MEMORY // window
    (memory, disk), (more, same) = found(1), found(most)
    assert (more - memory, same) == ((most - 1) * window, disk)
    less, larger = found(most + 1)
    logits = 3 * 4 * 3 * 16 * 416  # of the held-out text; never beside the activations
    assert (memory - less, larger - disk) == (window, (most + 1) * window - logits)


def test_float_weights_are_named_with_their_reason(tiny_llama: Path, run: Run) -> None:
    command = ["export", tiny_llama, "--target", "android", "--dry-run", "--json"]
    found = run(*command, "--grid", "*.0.mlp.up*=float16").json
    assert list(found["floats"]) == ["model.layers.0.mlp.up_proj.weight"]
    assert "float16" in found["floats"]["model.layers.0.mlp.up_proj.weight"]


def test_a_dry_run_refuses_what_an_export_refuses(
    make_model: Run, run: Run, tmp_path: Path
) -> None:
    model = make_model("llama", intermediate_size=80)  # no whole blocks of 32
    command = ["export", model, "--target", "android", "--preset", "int8", "--no-validate", "-q"]
    command += ["-o", tmp_path / "dist"]
    dry, real = run(*command, "--dry-run"), run(*command)
    assert (dry.code, dry.err) == (real.code, real.err)
    assert dry.code == 5 and "down_proj" in dry.err


def test_learning_takes_more_time_and_memory(tiny_llama: Path, run: Run) -> None:
    """Bytes depend on the grids alone. In memory, the libraries outweigh a tiny model's layer."""
    command = ["export", tiny_llama, "--target", "android", "--dry-run", "--json", "--method"]
    gptq, learnt, auto = (run(*command, name).json for name in ("gptq", "autoround", "auto"))
    large = decoder_config(json.loads((tiny_llama / "config.json").read_text()) | LARGE)
    memory = [forecast._memory(make_plan(large, method=m)) for m in ("gptq", "autoround", "auto")]
    assert memory[0] < memory[1] == memory[2]
    assert gptq["seconds"] < learnt["seconds"] < auto["seconds"]
    assert gptq["jobs"] == learnt["jobs"] == auto["jobs"]
