"""What fits a device, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimport.errors import UsageError
from slimport.shipping import planning

STORYTELLER = Path(__file__).parents[2] / "examples" / "storyteller"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
        **{"vocab_size": 128256, "tie_word_embeddings": True},
    },
    "7B": {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
        **{"tie_word_embeddings": False},
    },
}


def planned(shape: str, tmp_path: Path, *targets: str, **given: Any) -> dict[str, Any]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | SHAPES[shape]))
    return planning.plan(path, targets or ("galaxy-s24",), **given)


def row_of(found: dict[str, Any], preset: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["preset"] == preset)


@pytest.mark.parametrize(("shape", "low", "high"), [("3B", 2e9, 3e9), ("7B", 4e9, 6e9)])
def test_models_of_known_sizes(shape: str, low: float, high: float, tmp_path: Path) -> None:
    """What is said of phones: about 3B in 2 to 3 GB, 7B in 4 to 6 GB at 4 bits."""
    found = planned(shape, tmp_path)
    assert found["parameters"] == pytest.approx(float(shape[0]) * 1e9, rel=0.08)
    assert low < row_of(found, "int4")["anonymous"] < high


def test_the_longest_context_is_the_last_that_fits(tmp_path: Path) -> None:
    row = row_of(planned("7B", tmp_path), "Q2_K")
    assert row["refused"] == "" and 0 < row["longest"] < 8192
    assert not row_of(planned("7B", tmp_path, context=row["longest"]), "Q2_K")["refused"]
    longer = row_of(planned("7B", tmp_path, context=row["longest"] + 256), "Q2_K")
    assert "memory above" in longer["refused"]


def test_sizes_are_exact_with_a_tokenizer(run: Any) -> None:
    found = run("plan", STORYTELLER / "base", "--target", "android", "--json").json
    assert found["schema"] == "slimport.plan/1" and found["tokenizer"]
    recipe = ["--target", "android", "--method", "rtn", "--dry-run", "--json"]
    forecast = run("export", STORYTELLER / "base", "--preset", "int4", *recipe)
    job = forecast.json["jobs"][0]
    # The file's metadata name the model, which a config does not.
    assert abs(row_of(found, "int4")["device_bytes"] - sum(job["files"].values())) <= 64


def test_containers_say_what_they_refuse(tmp_path: Path, run: Any) -> None:
    found = planned("3B", tmp_path, "ios", "ios18-ane", "android-gpu")
    refused = {(row["target"], row["preset"]): row["refused"] for row in found["rows"]}
    assert "iOS 26 brought" in refused["ios", "int2"]
    assert "Neural Engine" in refused["ios18-ane", "int4"]
    assert "Vulkan" in refused["android-gpu", "int2"]
    assert "size above" not in refused["ios18-ane", "lut4"]
    done = run("plan", tmp_path / "config.json", "--target", "ios")
    assert done.code == 0 and "estimates" in done.out and "3.21B" in done.out


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no config"):
        planning.plan(tmp_path / "nothing", ["android"])
