"""What is refused before any work starts; without Qualcomm's wheel too."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from slimport.errors import DependencyMissing, Unsupported
from slimport.export import qnn as container
from slimport.export.qnn import sdk
from slimport.tokenizer.tokenizer import Tokenizer


def refuse(model: Any, source: Path) -> None:
    container.refuse(model.decoder, model.plan, Tokenizer.open(source))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "version", lambda name: sdk.VERSION)


def test_no_family_is_refused(variant: Any, make_model: Any, in_memory: Any) -> None:
    family, overrides = variant
    wide = {} if family == "phi3" else {"head_dim": 32}  # no narrow biases
    source = make_model(family, **overrides | wide)
    refuse(in_memory(source, "int8"), source)


@pytest.mark.parametrize("grid", ["float16", "int8-g32", "int2-g64"])
def test_grids_that_the_npu_does_not_hold_are_refused(
    grid: str, tiny_llama: Path, in_memory: Any
) -> None:
    model = in_memory(tiny_llama, "int8", {"*.0.mlp.gate_proj.weight": grid})
    with pytest.raises(Unsupported, match=f"cannot hold {grid}"):
        refuse(model, tiny_llama)


def test_rows_that_do_not_divide_are_refused(make_model: Any, in_memory: Any) -> None:
    source = make_model("llama", intermediate_size=90)
    with pytest.raises(Unsupported, match="rows of 90 do not divide"):
        refuse(in_memory(source), source)


def test_a_bias_that_is_added_by_itself_is_refused(make_model: Any, in_memory: Any) -> None:
    source = make_model("qwen2")
    with pytest.raises(Unsupported, match="a bias of 32 numbers by itself"):
        refuse(in_memory(source, "int8"), source)
    source = make_model("qwen2", head_dim=32)
    with pytest.raises(Unsupported, match="a bias of 128 numbers beside int4-g32") as failure:
        refuse(in_memory(source), source)
    assert "--preset int8" in failure.value.cure
    refuse(in_memory(source, "int8"), source)


def test_a_window_shortens_the_context(make_model: Any, in_memory: Any) -> None:
    decoder = in_memory(make_model("mistral", sliding_window=24), "int8").decoder
    assert container.context_length(decoder) == 24


def test_another_release_and_no_release_are_refused(
    tiny_llama: Path, in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, words in ((lambda name: "2.6.0", "it is 2.6.0"), (missing, "not installed")):
        monkeypatch.setattr(sdk, "version", version)
        with pytest.raises(DependencyMissing, match=words) as failure:
            refuse(in_memory(tiny_llama), tiny_llama)
        assert failure.value.exit_code == 6
        assert failure.value.cure == "pip install onnxruntime-qnn==2.7.0"


def test_without_tokenizer_json_it_is_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = Tokenizer.open(source)
    (source / "tokenizer.json").unlink()
    model = in_memory(tiny_llama)
    with pytest.raises(Unsupported, match=r"no tokenizer\.json"):
        container.refuse(model.decoder, model.plan, tokenizer)
