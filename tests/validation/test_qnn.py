"""The NPU's emulator as a runtime, and a whole export for it from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.errors import BadInput, ValidationFailed
from slimport.export.qnn import sdk
from slimport.quantize.windows import windows_of
from slimport.validation.judge import fitted
from slimport.validation.runtime import Effort
from slimport.validation.runtimes import qnn as runtime

Run = Callable[..., Any]
installed = pytest.mark.skipif(
    find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed"
)
POCKET = 'extends = "android-qnn-v75"\ncontext_length = 64\nprompt_lengths = [16]\n'


def recipe(recipe_for: Run, folder: Path, model: Path) -> Path:
    path: Path = recipe_for(folder, model)
    (folder / "pocket.toml").write_text(POCKET)
    return path


@pytest.fixture(scope="module")
def bundle(
    tiny_llama: Path,
    recipe_for: Run,
    run: Run,
    jobs_at_hand: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("qnn")
    with pytest.MonkeyPatch.context() as patch, jobs_at_hand("reference"):
        patch.setattr(runtime, "_ANSWER_SECONDS", 0.1)  # the fewest greedy tokens
        done = run("export", "--config", recipe(recipe_for, folder, tiny_llama), "--json", "-q")
    assert done.code == 0, done.err
    return folder / "dist" / "pocket"


@installed
def test_an_export_from_end_to_end(bundle: Path, run: Run) -> None:
    report = json.loads((bundle / "report/report.json").read_text())
    assert report["passed"] and report["container"] == "qnn"
    assert report["accelerator"] == {"npu_nodes": 1.0, "npu_weight_bytes": 1.0}
    assert report["errors"]["runtime"]["kl_mean"] < 1e-3
    assert report["tokenizer"]["conforms"]
    assert report["footprint"]["kv_cache"] == "i16"
    assert any("emulator" in words for words in report["not_executed"])
    measured = json.loads((bundle / "report/measurements.json").read_text())
    assert measured["speed"] == []
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["inputs"]["calibration"] is None  # rtn needs none
    assert manifest["inputs"]["activations"].startswith("sha256:")
    assert manifest["profile"]["hexagon"] == 75
    on_device = sum(
        (bundle / name).stat().st_size
        for name in (
            *("decode.onnx", "decode_qnn.bin", "prefill.onnx", "prefill_qnn.bin"),
            *("tables.data", "qnn.json", "tokenizer.json"),
        )
    )
    assert report["footprint"]["device_bytes"] == on_device  # qdq/ stays behind
    assert "not for the device" in (bundle / "README.md").read_text()
    assert run("verify", bundle).code == run("check", bundle).code == 0


@installed
def test_the_greedy_tokens_are_those_of_a_device(bundle: Path) -> None:
    golden = json.loads((bundle / "tokenizer/golden.json").read_text())
    first = golden["prompts"][0]
    (found,) = runtime.generate(bundle / "decode.onnx", [first["ids"]], 3)
    assert list(found.tokens) == first["greedy"][:3]


@installed
def test_a_binary_for_another_chip_is_not_judged(bundle: Path, tmp_path: Path) -> None:
    """The emulator would run it without a word."""
    folder = shutil.copytree(bundle, tmp_path / "copy")
    binary = folder / "decode_qnn.bin"
    content = binary.read_bytes()
    assert b"soc_type=SM8650;arch=75;" in content
    binary.write_bytes(content.replace(b"soc_type=SM8650;arch=75;", b"soc_type=SM8550;arch=73;"))
    with pytest.raises(ValidationFailed, match="is not for SM8650"):
        runtime.generate(folder / "decode.onnx", [[5, 6]], 1)


@installed
def test_a_cut_binary_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "copy")
    binary = folder / "prefill_qnn.bin"
    binary.write_bytes(binary.read_bytes()[:-4096])
    with pytest.raises(ValidationFailed):
        runtime.generate(folder / "decode.onnx", [[5, 6]], 1)


@installed
def test_a_text_longer_than_the_cache_is_refused(bundle: Path, tmp_path: Path) -> None:
    ids = np.zeros((1, 65), np.int32)
    with pytest.raises(BadInput, match="too long"):
        runtime.logits(bundle / "decode.onnx", ids, tmp_path / "o.npy")


@installed
def test_effort_shrinks_with_the_model(bundle: Path) -> None:
    effort = runtime.effort(bundle / "decode.onnx")
    assert effort.length == 64 and effort.tokens >= 128 and effort.generated >= 4


def test_a_target_without_the_processor_is_refused(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "version", lambda name: sdk.VERSION)
    path = recipe_for(tmp_path, tiny_llama)
    done = run("export", "--config", path, "--target", "android", "--container", "qnn", "-q")
    assert done.code == 5 and "Hexagon" in done.err
    assert not (tmp_path / "dist" / "android").exists()


def test_without_the_wheel_it_ends_with_its_command(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "version", lambda name: "2.6.0")
    done = run("export", "--config", recipe(recipe_for, tmp_path, tiny_llama), "-q")
    assert done.code == 6
    assert "pip install onnxruntime-qnn==2.7.0" in done.err


def test_windows_are_cut_to_what_a_runtime_can_judge() -> None:
    whole = windows_of(np.arange(20 * 512, dtype=np.int32).reshape(20, 512))
    assert fitted(whole, None) is whole
    assert fitted(whole, Effort(512, 1 << 20, 9)) is whole
    few = fitted(whole, Effort(512, 2048, 9))
    np.testing.assert_array_equal(few.ids, whole.ids[[0, 6, 12, 19]])
    short = fitted(whole, Effort(512, 256, 9))
    assert short.ids.shape == (2, 128) and short.digest != whole.digest
    assert fitted(whole, Effort(96, 1 << 20, 9)).ids.shape == (20, 96)
