"""What a user gives counts or is refused, and what the machine refuses is no internal error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from slimport import bundle, pipeline
from slimport.errors import BadInput
from slimport.recipe import load

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables

Run = Callable[..., Any]
RTN = ["--method", "rtn", "-q"]
PLAIN = ["--target", "android", *RTN, "--no-validate"]


@pytest.fixture(scope="module")
def lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter strong enough that half of it and all of it are far apart."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["o_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("strong")
    model.save_pretrained(folder)
    return folder


def edited(model: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    copy = shutil.copytree(model, folder)
    table = json.loads((copy / name).read_text())
    change(table)
    (copy / name).write_text(json.dumps(table))
    return copy


# ---- adapters ----


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_a_scale_beyond_float32_is_refused(
    mode: str, lora: Path, tiny_llama: Path, run: Run, tmp_path: Path
) -> None:
    words = ["--adapter", f"strong={lora}:1{'0' * 40}", "--adapter-mode", mode]
    done = run("export", tiny_llama, *words, "--target", "android", "-o", tmp_path, "--dry-run")
    assert done.code == 2 and "is beyond float32" in done.err, done.err


def test_the_scale_of_a_separate_adapter_counts(
    tiny_llama: Path, lora: Path, recipe_for: Run, run: Run, tmp_path: Path, at_hand: None
) -> None:
    """Oracle and artifact both apply half of it: else their logits are whole units apart."""
    done = run(
        "export", "--config", recipe_for(tmp_path, tiny_llama), "--adapter", f"tone={lora}:0.5",
        "--adapter", f"other={lora}", "--adapter-mode", "separate", "--preset", "int8",
        "--json", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    (report,) = done.json["bundles"]
    assert report["errors"]["runtime"]["kl_mean"] < 0.01
    assert any("other" in words for words in report["not_executed"])
    golden = json.loads((tmp_path / "dist/pocket/tokenizer/golden.json").read_text())
    assert golden["adapter"] == "tone.gguf"


def test_codes_made_with_another_scale_are_refused(
    tiny_llama: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    half = ["--adapter", f"tone={lora}:0.5"]
    assert run("quantize", tiny_llama, *half, *RTN, "-o", tmp_path / "q").code == 0
    start = ["export", tiny_llama, *PLAIN, "--quantized", tmp_path / "q", "-o", tmp_path]
    assert run(*start, *half).code == 0
    done = run(*start, "--adapter", f"tone={lora}")
    assert done.code == 7 and "scale" in done.err


# ---- settings ----


def test_codes_of_another_plan_are_refused(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    assert run("quantize", tiny_llama, *RTN, "-o", tmp_path / "q").code == 0
    start = ["export", tiny_llama, *PLAIN, "--quantized", tmp_path / "q", "-o", tmp_path]
    done = run(*start, "--preset", "int8")
    assert done.code == 2 and "other grids" in done.err


def test_search_is_refused_where_it_has_no_effect(
    tiny_llama: Path, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "slimport.toml"
    path.write_text(f'model = "{tiny_llama}"\n[quantize]\nsearch = false\n')
    done = run("inspect", "--config", path)
    assert done.code == 2 and "search" in done.err
    assert run("inspect", "--config", path, "--method", "rtn").code == 0


def test_two_targets_of_one_name_are_refused(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    own = tmp_path / "android.toml"
    own.write_text('extends = "galaxy-s24"\n')
    done = run("export", tiny_llama, *PLAIN, "--target", own, "-o", tmp_path / "dist")
    assert done.code == 2 and "2 targets are called android" in done.err
    assert not (tmp_path / "dist").exists()


def test_the_pre_tokenizer_can_be_named_for_every_verb(
    tiny_llama: Path, run: Run, tmp_path: Path
) -> None:
    """Without its name this tokenizer is refused; with it a bundle can be judged again, too."""

    def split_otherwise(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\s+|\S+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**spec["pre_tokenizer"], "use_regex": False},
            ],
        }

    model = edited(tiny_llama, tmp_path / "model", "tokenizer.json", split_otherwise)
    assert run("inspect", model).code == 5
    done = run("inspect", model, "--pre", "gpt-2", "--json")
    assert done.code == 0 and done.json["tokenizer"]["pre"] == "gpt-2"
    assert run("quantize", model, *RTN, "--pre", "gpt-2", "-o", tmp_path / "q").code == 0


# ---- what a bundle says ----


def test_a_manifest_names_every_input_and_no_path(
    tiny_llama: Path, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    def private(config: dict[str, Any]) -> None:
        config["_name_or_path"] = "/home/somebody/secret"

    model = edited(tiny_llama, tmp_path / "model", "config.json", private)
    for part in ("train.txt", "held_out.txt"):
        (tmp_path / part).mkdir(parents=True)
        shutil.copy(Path(__file__).parents[1] / "LICENSE", tmp_path / part / "LICENSE")
    recipe = recipe_for(tmp_path / "recipe", model)
    words = recipe.read_text()
    for part in ("train.txt", "held_out.txt"):  # each text in a folder with its own licence
        shutil.move(recipe.parent / part, tmp_path / part / part)
        words = words.replace(f'"{part}"', f'"{tmp_path / part / part}"')
    recipe.write_text(words)
    (folder,) = pipeline.export(load(recipe), validate=False)
    assert b"somebody" not in b"".join(
        path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    assert inputs["model"].keys() == {"name", "revision", "digest"}
    assert "sha256:" in inputs["tokenizer"]["tokenizer.json"]
    copied = sorted(path.name for path in (folder / "licenses").iterdir())
    assert copied == ["texts-2-LICENSE", "texts-LICENSE"]


def test_the_texts_that_were_judged_on_are_in_the_manifest(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["inputs"]["judged_on"].keys() == {"held_out"}


def test_validate_sees_codes_that_are_not_those_of_the_manifest(
    finished: Path, tmp_path: Path, at_hand: None
) -> None:
    """One nibble flipped and every sha256 made right again."""
    copy = shutil.copytree(finished, tmp_path / "pocket")
    file = copy / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-4096] ^= 1  # in the last layer's ffn_down
    file.write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    bundle.write_manifest(copy, {k: v for k, v in manifest.items() if k != "bundle_digest"})
    with pytest.raises(BadInput, match="codes"):
        pipeline.validate(copy, load(finished.parents[1] / "slimport.toml"))


# ---- no internal errors ----


def test_a_bundle_that_never_held_a_model_can_be_inspected(run: Run, tmp_path: Path) -> None:
    bundle.write_manifest(tmp_path, {"validated": False, "failed": "top1"})
    done = run("inspect", tmp_path, "--json")
    assert done.code == 0 and done.json["failed"] == "top1"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "x" * 300], 2),
        (["inspect", "~nobody-of-this-name/model"], 2),
        (["verify", "x" * 300], 8),
    ],
)
def test_paths_that_the_system_refuses(run: Run, arguments: list[str], code: int) -> None:
    done = run(*arguments)
    assert done.code == code and len(done.err.splitlines()) == 3, done.err


def test_numbers_that_no_container_holds(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    for index, number in enumerate((2**33, 10**400)):
        folder = tmp_path / str(index)
        model = edited(
            tiny_llama, folder, "config.json", lambda c, n=number: c.update(rms_norm_eps=n)
        )
        if number < 1e38:
            model = edited(
                model, tmp_path / "size", "config.json",
                lambda c, n=number: c.update(rms_norm_eps=1e-5, max_position_embeddings=n),
            )  # fmt: skip
        assert run("export", model, *PLAIN, "-o", tmp_path / "dist").code == 7


def test_memory_and_disk_that_run_out(
    tiny_llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), OSError(28, "No space left on device")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("slimport.inspection.inspect", fail)
        assert run("inspect", tiny_llama).code == 8


def test_sampling_needs_a_token_to_start_from(tiny_qwen2: Path, run: Run, tmp_path: Path) -> None:
    def nameless(table: dict[str, Any]) -> None:
        for key in ("bos_token", "eos_token", "bos_token_id", "eos_token_id"):
            table.pop(key, None)

    model = tiny_qwen2
    for index, name in enumerate(
        ("tokenizer_config.json", "generation_config.json", "config.json")
    ):
        model = edited(model, tmp_path / str(index), name, nameless)
    done = run("quantize", model, "--method", "gptq", "-q", "-o", tmp_path / "q")
    assert done.code == 7 and "--calibration" in done.err


def test_a_model_folder_with_an_adapter_in_it_is_refused(
    tiny_llama: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    """transformers would load the adapter's base in place of this one."""
    both = shutil.copytree(tiny_llama, tmp_path / "both")
    shutil.copy(lora / "adapter_config.json", both)
    for model in (both, lora):
        done = run("inspect", model)
        assert done.code == 7 and "--adapter" in done.err


@pytest.mark.parametrize(
    "words", ['isa = ["arm64", "dotprd"]', 'kv_cache = "q9_0"'], ids=["isa", "kv_cache"]
)
def test_a_typing_error_in_a_target_is_refused_before_any_work(
    tiny_llama: Path, run: Run, tmp_path: Path, words: str
) -> None:
    target = tmp_path / "own.toml"
    target.write_text(f'extends = "android"\n{words}\n')
    done = run("export", tiny_llama, "--target", target, *RTN, "-o", tmp_path / "dist")
    assert done.code == 2 and "own.toml" in done.err
    assert not (tmp_path / "dist").exists()


# ---- what the device must do ----


def test_the_readme_says_what_the_runtime_does_not_do(
    tiny_qwen2: Path, tiny_llama: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    assert run("export", tiny_qwen2, *PLAIN, "-o", tmp_path / "qwen").code == 0
    words = (tmp_path / "qwen/android/README.md").read_text()
    notes = json.loads((tmp_path / "qwen/android/tokenizer/generation.json").read_text())
    assert "NFC" in words and notes["normalization"] == "NFC"
    (note,) = json.loads((tmp_path / "qwen/android/manifest.json").read_text())["notes"]
    assert note in words and "llama.cpp" in note
    assert "--lora" not in words and "$" not in words
    beside = ["--adapter", f"tone={lora}", "--adapter-mode", "separate"]
    assert run("export", tiny_llama, *PLAIN, *beside, "-o", tmp_path / "llama").code == 0
    words = (tmp_path / "llama/android/README.md").read_text()
    assert "adb push adapters/tone.gguf" in words and "--lora tone.gguf" in words
    assert "NFC" not in words
    onnx = ["--container", "onnx", "-o", tmp_path / "onnx"]
    assert run("export", tiny_llama, *PLAIN, *onnx).code == 0
    words = (tmp_path / "onnx/android/README.md").read_text()
    (bos, trims) = json.loads((tmp_path / "onnx/android/manifest.json").read_text())["notes"]
    assert bos in words and trims in words and "`<|bos|>`" in bos and "$" not in words
    assert 'encode("<|bos|>Once upon a time")' in words
