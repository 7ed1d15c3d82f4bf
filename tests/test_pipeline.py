"""The verbs end to end on tiny models: adapters, several targets, texts, and what must not leak."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from slimport import bundle, pipeline
from slimport.errors import BadInput, BudgetExceeded, Unsupported, ValidationFailed
from slimport.export.gguf import reader
from slimport.quantize.store import QuantizedCheckpoint
from slimport.recipe import load
from slimport.shipping.texts import SAMPLED

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables

Run = Callable[..., Any]
EXPORT = ["--method", "rtn", "--no-validate", "-q"]


@pytest.fixture(scope="module")
def lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peft adapter on every attention matrix, large enough to be seen in the codes."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("the adapter's terms")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but what is measured of this machine."""
    return {
        name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in bundle.UNLISTED
    }


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


# ---- families ----


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "olmo2", "granite"])
def test_a_family_from_checkpoint_to_verified_bundle(
    family: str, make_model: Run, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """GPTQ, an adapter on every Linear, a tokenizer of the family's kind; judged in llama.cpp."""
    model = make_model(family)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(tmp_path / "lora")
    done = run(
        "export", "--config", recipe_for(tmp_path, model), "--adapter", f"a={tmp_path / 'lora'}",
        "--method", "gptq", "--preset", "int8", "--json", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["accuracy"]["held_out"]["kl_mean"] < 0.02
    assert found["tokenizer"]["conforms"]
    assert run("verify", tmp_path / "dist" / "pocket").code == 0


@pytest.mark.parametrize("grid", ["int2-g64", "int2-g256"])
def test_two_bits_are_judged_in_llama_cpp(
    grid: str, make_model: Run, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """Random weights are far from their 2-bit codes; what runs is close to these codes."""
    model = make_model("llama", hidden_size=256, intermediate_size=512)
    more = f'[quantize.patterns]\n"model.layers.*" = "{grid}"\n'
    recipe = recipe_for(tmp_path, model)
    recipe.write_text(recipe.read_text() + more)
    done = run("export", "--config", recipe, "--method", "gptq", "--json", "-q")
    assert done.code == 0, done.err
    (found,) = done.json["bundles"]
    assert found["errors"]["runtime"]["kl_mean"] < 0.05 * found["accuracy"]["held_out"]["kl_mean"]
    manifest = manifest_of(tmp_path / "dist" / "pocket")
    assert {"int2-g64": "Q2_0", "int2-g256": "TQ2_0"}[grid] in manifest["minimum_runtime"]["reason"]
    assert run("verify", tmp_path / "dist" / "pocket").code == 0


# ---- adapters ----


def test_merged_and_separate_are_judged_against_base_and_adapter(
    tiny_llama: Path, lora: Path, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """Both come close to the oracle with peft; the base alone is much further from it."""
    found = {}
    recipe = recipe_for(tmp_path, tiny_llama)
    for mode in ("merged", "separate"):
        done = run(
            "export", "--config", recipe, "--adapter", f"support={lora}", "--adapter-mode", mode,
            "--preset", "int8", "--json", "-q", "-o", tmp_path / mode,
        )  # fmt: skip
        assert done.code == 0, done.err
        (found[mode],) = done.json["bundles"]
        assert run("verify", tmp_path / mode / "pocket").code == 0
    for mode, report in found.items():
        assert report["accuracy"]["held_out"]["kl_mean"] < 0.01
        assert report["errors"]["runtime"]["kl_mean"] < 0.01
        (adapter,) = report["adapters"]
        assert (adapter["name"], adapter["kind"], adapter["mode"]) == (
            "support",
            "LoRA rank 4",
            mode,
        )
    merged, separate = (tmp_path / mode / "pocket" for mode in ("merged", "separate"))
    assert not (merged / "adapters").exists()
    adapter_file = reader.open_gguf(separate / "adapters" / "support.gguf")
    assert adapter_file.metadata["general.type"] == "adapter"
    assert len(adapter_file.tensors) == 2 * 2 * 2  # a and b of q and v, in two layers
    digests = [manifest_of(folder)["digests"] for folder in (merged, separate)]
    changed = {name.split(".")[-2] for name in digests[0] if digests[0][name] != digests[1][name]}
    assert changed == {"q_proj", "v_proj"}


def test_separate_codes_are_those_of_the_base_alone(
    tiny_llama: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    base = ["export", tiny_llama, "--target", "android", *EXPORT]
    assert run(*base, "-o", tmp_path / "base").code == 0
    separate = ["--adapter", f"support={lora}", "--adapter-mode", "separate"]
    assert run(*base, *separate, "-o", tmp_path / "separate").code == 0
    plain, beside = tmp_path / "base/android", tmp_path / "separate/android"
    assert (plain / "model.gguf").read_bytes() == (beside / "model.gguf").read_bytes()
    assert "adapters/support.gguf" in (beside / "README.md").read_text()
    assert (beside / "licenses/adapter-support-LICENSE").read_text() == "the adapter's terms"


def test_the_scale_of_the_command_line_counts(
    tiny_llama: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    found = []
    for scale in ("0", "1", "2"):
        output = tmp_path / scale
        adapter = ["--adapter", f"support={lora}:{scale}"]
        done = run("export", tiny_llama, *adapter, "--target", "android", *EXPORT, "-o", output)
        assert done.code == 0, done.err
        manifest = manifest_of(output / "android")
        assert manifest["inputs"]["adapters"][0]["scale"] == float(scale)
        found.append(manifest["weights_digest"])
    assert run("export", tiny_llama, "--target", "android", *EXPORT, "-o", tmp_path).code == 0
    assert found[0] == manifest_of(tmp_path / "android")["weights_digest"]
    assert len(set(found)) == 3


# ---- targets ----


def test_several_targets_share_one_quantization(
    tiny_llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    quantize = pipeline.quantizer.quantize
    monkeypatch.setattr(
        pipeline.quantizer, "quantize", lambda *a, **k: calls.append(1) or quantize(*a, **k)
    )
    targets = ["--target", "android", "--target", "galaxy-s24"]
    done = run("export", tiny_llama, *targets, *EXPORT, "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    assert calls == [1]
    one, two = (manifest_of(Path(shown["path"])) for shown in done.json["bundles"])
    assert (one["target"], two["target"]) == ("android", "galaxy-s24")
    assert one["weights_digest"] == two["weights_digest"]
    assert one["bundle_digest"] != two["bundle_digest"]
    names = {path.name for path in tmp_path.iterdir() if not path.name.endswith("lock")}
    assert names == {"android", "galaxy-s24"}


def test_one_target_that_fails_does_not_take_the_others_along(
    tiny_llama: Path, recipe_for: Run, tmp_path: Path, at_hand: None
) -> None:
    path = recipe_for(tmp_path, tiny_llama)
    tight = '[budgets.model_bytes]\nlimit = "1 kB"\nsource = "choice"\n'
    (tmp_path / "tight.toml").write_text('extends = "pocket.toml"\n' + tight)
    recipe = load(path).override(
        targets=[str(tmp_path / "tight.toml"), str(tmp_path / "pocket.toml")]
    )
    with pytest.raises(BudgetExceeded, match="model_bytes"):
        pipeline.export(recipe)
    assert pipeline.verify(tmp_path / "dist/pocket")
    assert bundle.verify(tmp_path / "dist/tight.failed")["passed"] is False
    assert not (tmp_path / "dist/tight").exists()


def test_a_container_is_refused_before_any_work(make_model: Run, tmp_path: Path) -> None:
    """Rows of 80 inputs hold no whole blocks of int8-row in GGUF."""
    model = make_model("llama", intermediate_size=80)
    path = tmp_path / "slimport.toml"
    path.write_text(f'model = "{model}"\ntargets = ["android"]\n[quantize]\npreset = "int8"\n')
    with pytest.raises(Unsupported, match="down_proj"):
        pipeline.export(load(path), validate=False)
    assert not (tmp_path / "dist").exists()


def test_a_wrong_pre_is_found_without_validation_too(tiny_llama: Path, tmp_path: Path) -> None:
    """The tiny tokenizer is gpt-2's kind; "tekken" parts digits and letters otherwise."""
    path = tmp_path / "slimport.toml"
    path.write_text(f'model = "{tiny_llama}"\ntargets = ["android"]\npre = "tekken"\n')
    with pytest.raises(ValidationFailed, match="token"):
        pipeline.export(load(path).override(method="rtn"), validate=False)
    assert not (tmp_path / "dist" / "android").exists()


# ---- what a bundle holds ----


def test_nothing_of_this_machine_is_in_a_bundle(finished: Path, tiny_llama: Path) -> None:
    folders = [str(tiny_llama), str(finished.parents[1]), str(Path.home()), os.getcwd()]
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b".encode())
    for path in finished.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [folder for folder in folders if folder.encode() in content], path.name
            assert path.suffix == ".gguf" or not host.search(content), path.name


def test_licences_travel_along(tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "LICENSE").write_text("the model's terms")
    (model / "NOTICE.txt").write_text("a notice")
    recipe = recipe_for(tmp_path, model)
    done = run("export", "--config", recipe, *EXPORT)
    assert done.code == 0, done.err
    licenses = tmp_path / "dist/pocket/licenses"
    assert sorted(path.name for path in licenses.iterdir()) == ["base-LICENSE", "base-NOTICE.txt"]
    assert (licenses / "base-LICENSE").read_text() == "the model's terms"


def test_budgets_of_the_recipe_stand_over_those_of_the_target(finished: Path) -> None:
    rows = {budget.metric: budget for budget in pipeline.check(finished)}
    assert (rows["kl_mean"].limit, rows["kl_mean"].source) == (100, "recipe")
    assert rows["download_bytes"].limit == 1_500_000_000
    assert "Play" in rows["download_bytes"].source or "android" in rows["download_bytes"].source
    others = {budget.metric: budget.limit for budget in pipeline.check(finished, "galaxy-s24")}
    assert (others["memory_bytes"], others["kl_mean"]) == (4_000_000_000, 0.1)


# ---- the same again ----


def test_gptq_on_sampled_text_gives_the_same_bytes_twice(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """No text is given: the model writes its own, and both exports read the same."""
    for name in ("one", "two"):
        recipe = recipe_for(tmp_path / name, tiny_llama)
        table = recipe.read_text().replace('calibration = "train.txt"\n', "")
        recipe.write_text(table.replace('eval = "held_out.txt"\n', ""))
        done = run("export", "--config", recipe, "--method", "gptq", "-q", "--json")
        assert done.code == 0, done.err
        assert done.json["bundles"][0]["texts"] == {"calibration": SAMPLED, "held_out": SAMPLED}
    one, two = (tree(tmp_path / name / "dist/pocket") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert "report/report.json" in one and "tokenizer/golden.json" in one


def test_an_export_from_a_quantized_checkpoint_is_the_same(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    quantized = tmp_path / "quantized"
    done = run("quantize", "--config", recipe, "--method", "gptq", "-o", quantized, "-q", "--json")
    assert done.code == 0, done.err
    assert QuantizedCheckpoint.open(quantized).weights_digest == done.json["weights_digest"]
    export = ["export", "--config", recipe, "--method", "gptq", "--no-validate", "-q"]
    assert run(*export, "-o", tmp_path / "one").code == 0
    assert run(*export, "-o", tmp_path / "two", "--quantized", quantized).code == 0
    assert tree(tmp_path / "one/pocket") == tree(tmp_path / "two/pocket")


def test_a_quantized_checkpoint_of_another_model_is_refused(
    tiny_llama: Path, make_model: Run, run: Run, tmp_path: Path
) -> None:
    assert run("quantize", tiny_llama, "--method", "rtn", "-o", tmp_path / "q", "-q").code == 0
    other = make_model("llama", seed=7)
    done = run(
        "export", other, "--target", "android", "--quantized", tmp_path / "q", *EXPORT,
        "-o", tmp_path / "dist",
    )  # fmt: skip
    assert done.code == 7 and "was not quantized from" in done.err


# ---- judging again ----


def test_validate_finds_what_the_export_found(finished: Path, at_hand: None) -> None:
    recipe = load(finished.parents[1] / "slimport.toml")
    before = tree(finished)
    again = pipeline.validate(finished, recipe)
    assert tree(finished) == before
    told = pipeline.report_of(finished)
    del again["measurements"], told["measurements"]
    assert again == told


def test_a_bundle_that_was_not_judged_can_be_judged_later(
    tiny_llama: Path, recipe_for: Run, tmp_path: Path, finished: Path, at_hand: None
) -> None:
    recipe = load(recipe_for(tmp_path, tiny_llama))
    (folder,) = pipeline.export(recipe, validate=False)
    judged = pipeline.validate(folder, recipe)
    assert judged["accuracy"] == pipeline.report_of(finished)["accuracy"]


def test_validate_refuses_another_model_or_adapter(
    finished: Path, make_model: Run, lora: Path
) -> None:
    recipe = load(finished.parents[1] / "slimport.toml")
    other = recipe.override(model=str(make_model("llama", seed=7)))
    with pytest.raises(BadInput, match="another model"):
        pipeline.validate(finished, other)
    with pytest.raises(BadInput, match="another set of adapters"):
        pipeline.validate(finished, recipe.override(adapters={"support": str(lora)}))
