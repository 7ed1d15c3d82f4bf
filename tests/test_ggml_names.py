"""llama.cpp's names on the command line: --gguf-type, imatrix, --imatrix, compare, fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = __file__
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def wide(make_model: Any) -> Path:
    """Rows of 256, and of 288, which divide into blocks of 32 only."""
    return Path(make_model("llama", hidden_size=256, intermediate_size=288))


@pytest.fixture(scope="module")
def recipe(wide: Path, recipe_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(recipe_for(tmp_path_factory.mktemp("mixes"), wide))


def types(run: Run, bundle: Path) -> dict[str, str]:
    """{tensor of layer 1 or outside of layers: its type}."""
    found = run("compare", bundle, bundle, "--json").json["tensors"]
    return {tensor["name"]: tensor["types"][0] for tensor in found if "blk.0" not in tensor["name"]}


def test_a_mix_from_command_to_judged_bundle(
    recipe: Path, run: Run, at_hand: None, tmp_path: Path
) -> None:
    command = ["export", "--config", recipe, "--gguf-type", "q4_k_m"]
    predicted = run(*command, "--dry-run", "--json")
    assert predicted.code == 0, predicted.err
    done = run(*command, "--method", "gptq", "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    (shown,) = done.json["bundles"]
    (job,) = predicted.json["jobs"]
    assert job["files"]["model.gguf"] == (tmp_path / "pocket" / "model.gguf").stat().st_size
    held = types(run, tmp_path / "pocket")
    assert held["blk.1.attn_q.weight"] == "Q4_K" and held["blk.1.attn_v.weight"] == "Q6_K"
    assert held["token_embd.weight"] == "Q6_K"
    assert held["blk.1.ffn_down.weight"] == "Q8_0"
    reason = "mix Q4_K_M: Q8_0 instead of Q6_K, whose blocks do not divide 288"
    assert shown["fallbacks"][reason] == ["model.layers.1.mlp.down_proj.weight"]
    assert shown["fallbacks"] == predicted.json["fallbacks"] and len(shown["fallbacks"]) == 2
    assert shown["passed"] and shown["errors"]["runtime"]["kl_mean"] < 0.02
    report = (tmp_path / "pocket" / "report" / "report.html").read_text()
    assert "Q8_0 instead of Q6_K" in report


def test_fallbacks_are_told_before_and_after(recipe: Path, run: Run, tmp_path: Path) -> None:
    command = ["export", "--config", recipe, "--gguf-type", "Q4_K_M"]
    for more in (["--dry-run"], ["--no-validate", "-o", tmp_path]):
        done = run(*command, *more)
        assert done.code == 0, done.err
        assert "1 weight, mix Q4_K_M: Q8_0 instead of Q6_K" in done.out
        assert "model.layers.1.mlp.down_proj.weight" in done.out


def test_an_importance_matrix_is_written_and_used(
    wide: Path, recipe: Path, run: Run, tmp_path: Path
) -> None:
    matrix = tmp_path / "imatrix.gguf"
    text = recipe.parent / "train.txt"
    written = run("imatrix", "--config", recipe, "--calibration", text, "-o", matrix, "--json")
    assert written.code == 0, written.err
    assert written.json["weights"] == 14 and written.json["text"] == "train.txt"
    again = run("imatrix", "--config", recipe, "-o", matrix)
    assert again.code == 2 and "exists" in again.err
    digests = []
    for source in (["--imatrix", matrix], ["--calibration", text]):
        output = tmp_path / source[0].strip("-")
        command = ["quantize", "--config", recipe, "--preset", "Q3_K_M", "--method", "imatrix"]
        done = run(*command, *source, "-o", output, "--json")
        assert done.code == 0, done.err
        digests.append(done.json["weights_digest"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gguf-type", "Q4_K_M", "--preset", "int4"], "are given together"),
        (["--gguf-type", "Q4_K"], "--gguf-type Q4_K is not known"),
        (["--gguf-type", "IQ2_XS", "--method", "rtn"], "without an importance matrix"),
        (["--gguf-type", "Q4_K_M", "--imatrix", "absent.gguf"], "absent.gguf"),
        (["--method", "imatrix", "--imatrix", HERE, "--calibration", HERE], "are given together"),
        (["--preset", "int4", "--method", "imatrix"], "does not take method imatrix"),
    ],
)
def test_what_is_refused_in_three_lines(
    flags: list[str], words: str, recipe: Path, run: Run, tmp_path: Path
) -> None:
    done = run("export", "--config", recipe, *flags, "-o", tmp_path / "dist")
    assert done.code == 2 and words in done.err
    assert len(done.err.strip().splitlines()) == 3
    assert not (tmp_path / "dist").exists()


def test_the_type_chooses_its_container(recipe: Path, run: Run) -> None:
    command = ["export", "--config", recipe, "--gguf-type", "Q4_K_M", "--dry-run", "--json"]
    assert run(*command).json["jobs"][0]["container"] == "gguf"
    assert run(*command, "--container", "litertlm").code == 5


def test_a_comparison_to_read(finished: Path, recipe: Path, run: Run, tmp_path: Path) -> None:
    done = run("compare", finished, finished, "--eval", recipe.parent / "held_out.txt")
    assert done.code == 0, done.err
    assert "0 differ" in done.out and "second to first" in done.out and "100.0%" in done.out
    found = run("compare", finished, finished, "--json").json
    assert found["schema"] == "slimport.compare/1"
    absent = run("compare", finished, tmp_path / "absent.gguf")
    assert absent.code == 2 and "does not exist" in absent.err
