"""Reward models end to end: a base and an adapter with a score head, or a whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from slimport import pipeline
from slimport.recipe import load

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about new heads

Run = Callable[..., Any]
RECIPE = """\
model = "{model}"
name = "judge"
targets = ["pocket.toml"]
container = "onnx"
[quantize]
preset = "int8"
method = "rtn"
[texts]
eval = "pairs.jsonl"
[budgets]
pair_agreement = 0.5  # random weights
score_error = 1
"""
POCKET = """\
extends = "android"
context_length = 64
prompt_lengths = [16, 32]
"""


def recipe(folder: Path, model: Path, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pocket.toml").write_text(POCKET)
    rows = [
        {"prompt": f"Tell {number}", "chosen": " a story", "rejected": f" {number} lies"}
        for number in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "slimport.toml").write_text(RECIPE.format(model=model) + more)
    return folder / "slimport.toml"


def adapter(model: Path, folder: Path) -> Path:
    """A peft adapter with a score head, as a reward trainer saves it."""
    base: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj"])
    adapted = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Whatever judges runs in this process."""
    with jobs_at_hand("reference", "onnxruntime"):
        yield


@pytest.fixture(scope="module")
def exported(
    make_model: Any, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A recipe and its bundle: an untied base that an adapter makes a reward model."""
    folder = tmp_path_factory.mktemp("reward")
    base = make_model("llama", tie_word_embeddings=False)
    more = f'[adapters]\njudge = "{adapter(base, folder / "adapter")}"\n'
    path = recipe(folder, base, more)
    done = run("export", "--config", path, "-q")
    assert done.code == 0, done.err
    return path, folder / "dist" / "pocket"


def test_the_bundle_is_a_reward_model(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report" / "report.json").read_text())
    golden = json.loads((folder / "tokenizer" / "golden.json").read_text())
    assert manifest["config"]["architectures"] == ["LlamaForSequenceClassification"]
    assert manifest["inputs"]["judged_on"].keys() == {"held_out"}
    assert "lm_head.weight" not in {row["name"] for row in report["layers"]}
    found = report["preference"]["held_out"]
    assert found["pairs"] == 12 and found["score_error"] < 0.2
    assert report["errors"]["graph"]["score_max"] < 1e-5
    assert report["errors"]["file"]["codes_equal"]
    assert report["texts"]["held_out"] == "pairs.jsonl, 12 of 12 pairs"
    assert len(golden["texts"]) == 6 and all(text["ids"] for text in golden["texts"])
    readme = (folder / "README.md").read_text()
    assert "reward model" in readme and "createSession" in readme and "$" not in readme


def test_the_readme_scores_what_was_judged(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python is run: strings here, with the BOS that the tokenizer adds."""
    folder = exported[1]
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    golden = json.loads((folder / "tokenizer" / "golden.json").read_text())["texts"]
    found = [names["score"]("Tell 0", answer) for answer in (" a story", " 0 lies")]
    assert found == [text["score"] for text in golden[:2]]


def test_verify_check_and_validate(exported: tuple[Path, Path], run: Run) -> None:
    path, folder = exported
    assert run("verify", folder).code == 0
    assert run("check", folder).code == 0
    stored = json.loads((folder / "report" / "report.json").read_text())
    again = pipeline.validate(folder, load(path))
    assert again["preference"] == stored["preference"]
    assert again["errors"]["quantization"] == stored["errors"]["quantization"]


def test_the_dry_run_predicts_every_byte(exported: tuple[Path, Path], run: Run) -> None:
    path, folder = exported
    done = run("export", "--config", path, "-q", "--dry-run", "--json")
    assert done.code == 0, done.err
    (job,) = done.json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_two_exports_are_the_same_bytes(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    path, folder = exported
    done = run("export", "--config", path, "-q", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "again" / "pocket" / "manifest.json").read_text())
    assert (
        again["bundle_digest"]
        == json.loads((folder / "manifest.json").read_text())["bundle_digest"]
    )


def test_a_whole_reward_model(make_model: Any, run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path, make_model("qwen2", reward=True))
    text = tmp_path / "text.txt"
    text.write_text("A text to calibrate on, said again. " * 900)
    done = run(
        *("export", "--config", path, "-q", "--preset", "int4", "--method", "gptq"),
        *("--calibration", text),
    )
    assert done.code == 0, done.err
    assert "same order" in done.out and "score after" in done.out
    assert run("inspect", tmp_path / "dist" / "pocket", "--json").code == 0


REFUSED = {
    "gguf": (["--container", "gguf"], 5, "container gguf cannot hold a reward model"),
    "ort": (["--container", "ort"], 5, "container ort cannot hold a reward model"),
    "onnx-fp16": (["--container", "onnx-fp16"], 5, "onnx-fp16 cannot hold a reward model"),
    "executorch": (["--container", "executorch"], 5, "executorch cannot hold a reward model"),
    "qnn": (["--container", "qnn"], 5, "container qnn cannot hold a reward model"),
    "no calibration": (["--method", "gptq"], 2, "no text to calibrate on"),
    "separate": (["--adapter-mode", "separate"], 5, "the adapter judge cannot stay separate"),
}


@pytest.mark.parametrize(("flags", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    flags: list[str], code: int, words: str, exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    done = run("export", "--config", exported[0], "-q", "-o", tmp_path / "out", *flags)
    assert done.code == code and words in done.err, done.err
    assert len(done.err.strip().splitlines()) == 3
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_budgets_of_the_other_kind_are_refused(
    make_model: Any, run: Run, tmp_path: Path, recipe_for: Run, tiny_llama: Path
) -> None:
    path = recipe(tmp_path / "a", make_model("llama", reward=True), "kl_mean = 1\n")
    done = run("export", "--config", path, "-q")
    assert done.code == 2 and "a budget for kl_mean, which no reward model has" in done.err
    path = recipe_for(tmp_path / "b", tiny_llama)
    path.write_text(path.read_text() + "pair_agreement = 0.9\n")
    done = run("export", "--config", path, "-q")
    assert done.code == 2 and "which no language model has" in done.err


def test_pairs_are_needed_to_judge(make_model: Any, run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path, make_model("llama", reward=True))
    path.write_text(path.read_text().replace('eval = "pairs.jsonl"', ""))
    done = run("export", "--config", path, "-q")
    assert done.code == 2 and "nothing to judge the reward model on" in done.err
    assert run("export", "--config", path, "-q", "--dry-run").code == 2
    assert run("export", "--config", path, "-q", "--dry-run", "--no-validate").code == 0
    done = run("export", "--config", path, "-q", "--no-validate")
    assert done.code == 0, done.err
    readme = (tmp_path / "dist" / "pocket" / "README.md").read_text()
    assert "and not judged" in readme and "golden" not in readme and "report.html" not in readme


def test_a_matrix_in_float16_is_the_same_everywhere(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    """Merged weights are float32: they are rounded once, before oracle and file part."""
    grid = "model.layers.0.*=float16"
    done = run("export", "--config", exported[0], "-q", "-o", tmp_path / "out", "--grid", grid)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "pocket" / "report" / "report.json").read_text())
    assert report["errors"]["graph"]["score_max"] < 1e-5


def test_quantize_refuses_what_export_refuses(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    flags = ("--adapter-mode", "separate", "-o", tmp_path / "out")
    done = run("quantize", "--config", exported[0], "-q", *flags)
    assert done.code == 5 and "cannot stay separate" in done.err


def test_classifiers_of_several_labels_are_refused(
    make_model: Any, run: Run, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model("llama", reward=True), model)
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (model / "config.json").write_text(json.dumps(config))
    done = run("export", "--config", recipe(tmp_path / "out", model), "-q")
    assert done.code == 5 and "number of labels" in done.err


def test_a_language_adapter_over_a_reward_model_is_refused(
    make_model: Any, run: Run, tmp_path: Path, exported: tuple[Path, Path]
) -> None:
    made = exported[0].parent / "adapter"
    other = tmp_path / "adapter"
    shutil.copytree(made, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    path = recipe(tmp_path / "out", make_model("llama", reward=True))
    done = run("export", "--config", path, "-q", "--adapter", f"tone={other}")
    assert done.code == 5 and "cannot be applied to a reward model" in done.err


def test_an_adapter_without_its_score_head_is_refused(
    exported: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    path, made, other = exported[0], exported[0].parent / "adapter", tmp_path / "adapter"
    shutil.copytree(made, other)
    tensors = load_file(made / "adapter_model.safetensors")
    (name,) = (name for name in tensors if "score" in name)
    headless = {key: value for key, value in tensors.items() if key != name}
    save_file(headless, other / "adapter_model.safetensors")
    done = run("export", "--config", path, "-q", "--adapter", f"judge={other}")
    assert done.code == 7 and "nothing in it for score.weight" in done.err
    save_file(tensors | {name: np.ones((2, 64), np.float32)}, other / "adapter_model.safetensors")
    done = run("export", "--config", path, "-q", "--adapter", f"judge={other}")
    assert done.code == 7 and "not (1, 64)" in done.err
