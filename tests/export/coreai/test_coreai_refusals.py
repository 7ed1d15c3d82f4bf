"""What is refused before any work starts; without Apple's packages too."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from slimport.errors import DependencyMissing, Unsupported
from slimport.export import coreai as container
from slimport.export.container import Deployment
from slimport.export.coreai import packing, sdk
from slimport.export.coreai.layout import FAMILIES, layout
from slimport.tokenizer.tokenizer import Tokenizer


def refuse(model: Any, source: Path) -> None:
    container.refuse(model.decoder, model.plan, Tokenizer.open(source))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "version", sdk.VERSIONS.__getitem__)


def test_families_that_were_not_run_are_refused(
    variant: Any, make_model: Any, in_memory: Any
) -> None:
    family, overrides = variant
    source = make_model(family, **overrides)
    if family in FAMILIES:
        refuse(in_memory(source), source)
        return
    with pytest.raises(Unsupported, match="cannot go to Core AI yet") as failure:
        refuse(in_memory(source), source)
    assert "--target ios" in failure.value.cure


@pytest.mark.parametrize("grid", ["int8-g32", "Q4_K", "lut4-r16"])
def test_grids_that_are_not_held_exactly_are_refused(
    grid: str, tiny_llama: Path, make_model: Any, in_memory: Any
) -> None:
    from slimport.architectures import decoder_config
    from slimport.checkpoint import Checkpoint
    from slimport.quantize.plan import make_plan

    source = make_model("llama", hidden_size=256)
    config = decoder_config(Checkpoint.open(source).config)
    plan = make_plan(config, "int4", "rtn", {"*.0.self_attn.q_proj.weight": grid})
    with pytest.raises(Unsupported, match=f"Core AI cannot hold the grid {grid}"):
        container.refuse(config, plan, Tokenizer.open(source))


def test_a_scale_that_overflows_float16_with_its_code_is_refused(
    tiny_llama: Path, in_memory: Any
) -> None:
    model = in_memory(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    model.tensors[f"{name}.weight"].scale[3, 1] = 2.0**15
    stored = layout(model.decoder, model.plan, 64).by_name[f"{name}.scale"]
    with pytest.raises(Unsupported, match="a weight may be as large as 262144"):
        list(packing.parts(stored, model))


def test_another_release_and_no_release_are_exit_6(
    tiny_llama: Path, in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, words in ((lambda name: "1.0", "it is 1.0"), (missing, "not installed")):
        monkeypatch.setattr(sdk, "version", version)
        with pytest.raises(DependencyMissing, match=words) as failure:
            refuse(in_memory(tiny_llama), tiny_llama)
        assert failure.value.exit_code == 6
        assert failure.value.cure == sdk.INSTALL
        assert len(str(failure.value).splitlines()) == 3


def test_an_older_ios_has_no_core_ai(tiny_llama: Path, in_memory: Any) -> None:
    plan = in_memory(tiny_llama).plan
    container.refuse_deployment(plan, Deployment(64, ios=27))
    with pytest.raises(Unsupported, match="iOS 26 has no Core AI") as failure:
        container.refuse_deployment(plan, Deployment(64, ios=26))
    assert "--target ios27" in failure.value.cure


def test_without_tokenizer_json_it_is_refused(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = Tokenizer.open(source)
    (source / "tokenizer.json").unlink()
    model = in_memory(tiny_llama)
    with pytest.raises(Unsupported, match=r"no tokenizer\.json"):
        container.refuse(model.decoder, model.plan, tokenizer)
