"""Checkpoints of others through the verbs: the same codes in every container, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimport.checkpoint import Checkpoint
from slimport.quantize.given import open_given
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.tensor import QuantizedTensor

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables

Run = Callable[..., Any]
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def awq(
    tiny_llama: Path, rewritten: Any, round_to: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every Linear but one on uint4-g32-f16."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    folder = tmp_path_factory.mktemp("awq") / "model"

    def form(name: str, weight: torch.Tensor) -> Any:
        return None if name.endswith("1.mlp.down_proj.weight") else round_to(weight, 32).awq()

    return rewritten(tiny_llama, folder, form, {"quantization_config": settings})


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_a_bundle_is_judged_against_what_the_codes_mean(
    awq: Path, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    recipe = recipe_for(tmp_path, awq)
    table = ["--grid", "model.embed_tokens.weight=float16"]
    done = run("export", "--config", recipe, *table, "--json", "-q")
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["errors"]["quantization"]["kl_mean"] < 1e-5  # of what is rounded to float16
    assert found["accuracy"]["held_out"]["kl_mean"] < 0.02
    bundle = tmp_path / "dist" / "pocket"
    stated = manifest(bundle)
    assert stated["notes"][0].startswith("AWQ quantized these weights")
    assert "quantization_config" not in stated["config"]
    plan = stated["plan"]["weights"]
    grids = {name: (entry["grid"], entry["method"]) for name, entry in plan.items()}
    assert grids[Q] == ("uint4-g32-f16", "given") and stated["errors"][Q] == 0
    assert grids[DOWN] == grids["model.embed_tokens.weight"] == (None, "")
    assert run("verify", bundle).code == 0
    assert run("validate", bundle, "--config", recipe, "-q").code == 0


def test_every_container_holds_the_same_codes(awq: Path, run: Run, tmp_path: Path) -> None:
    assert run("quantize", awq, "-o", tmp_path / "codes", "-q").code == 0
    quantized = QuantizedCheckpoint.open(tmp_path / "codes")
    table = quantized.plan["model.embed_tokens.weight"]
    assert table.grid is not None and (table.grid.name, table.method) == ("int8-row", "rtn")
    given = open_given(Checkpoint.open(awq))
    assert given is not None
    for name in given.grids:
        stored, tensor = quantized.load(name), given.load(name)
        assert isinstance(stored, QuantizedTensor)
        assert stored.digest(name) == tensor.digest(name)
        np.testing.assert_array_equal(quantized.rows(name, 2, 5), given.rows(name, 2, 5))
    for container in ("gguf", "onnx", "coreml"):
        target = "ios18-gpu" if container == "coreml" else "android"
        done = run(
            *("export", awq, "--quantized", tmp_path / "codes", "--container", container),
            *("--target", target, "--no-validate", "-q", "-o", tmp_path / container),
        )
        assert done.code == 0, done.err
        bundle = tmp_path / container / target
        assert manifest(bundle)["weights_digest"] == quantized.weights_digest
        assert run("verify", bundle).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--container", "executorch"], "ExecuTorch"),
        (["--grid", "*.q_proj.weight=int8-row"], "is quantized already, on uint4-g32-f16"),
        (["--grid", "*down_proj.weight=int8-row"], "is quantized already"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_work(
    awq: Path, run: Run, tmp_path: Path, flags: list[str], message: str
) -> None:
    done = run(
        "export", awq, "--target", "android", *flags, "--no-validate", "-o", tmp_path / "out"
    )
    assert done.code in (2, 5) and message in done.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_was_left_in_full_precision_may_be_given_a_grid(
    awq: Path, run: Run, tmp_path: Path
) -> None:
    grid = ["--grid", f"{DOWN}=int8-row"]
    done = run("quantize", awq, *grid, "--method", "rtn", "-o", tmp_path / "codes", "-q")
    assert done.code == 0, done.err
    choice = QuantizedCheckpoint.open(tmp_path / "codes").plan[DOWN]
    assert choice.grid is not None and choice.grid.name == "int8-row" and choice.method == "rtn"


def test_an_adapter_is_not_merged_and_may_stay_beside(
    awq: Path, tiny_llama: Path, make_adapter: Run, run: Run, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "lora", 1, ["q_proj"])
    line = [
        "export",
        awq,
        "--target",
        "android",
        "--adapter",
        f"a={adapter}",
        "--no-validate",
        "-q",
    ]
    done = run(*line, "-o", tmp_path / "merged")
    assert done.code == 5 and "cannot be merged into model, which AWQ quantized" in done.err
    assert "--adapter-mode separate" in done.err
    done = run(*line, "--adapter-mode", "separate", "-o", tmp_path / "separate")
    assert done.code == 0, done.err
    assert (tmp_path / "separate" / "android" / "adapters" / "a.gguf").is_file()
