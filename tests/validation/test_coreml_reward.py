"""Reward models in Core ML: scores of whole texts, held to transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput
from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import coreml

pytestmark = [
    pytest.mark.skipif(coreml.EXECUTES, reason="Core ML itself would run the packages"),
    pytest.mark.filterwarnings("ignore"),  # transformers warns about new heads
]

Run = Callable[..., Any]
CONTEXT = 90
PAD = 2
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("int4", "llama", {}),
    "llama of one head for all": ("int8", "llama", {"num_key_value_heads": 1}),
    "qwen2": ("int8", "qwen2", {}),
    "qwen3": ("lut4", "qwen3", {}),
    "mistral with a window": ("int8", "mistral", {"sliding_window": 24}),
    "gemma 3": ("int8", "gemma3_text", {"num_hidden_layers": 7}),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the model's file."""

    model: Path
    quantized: QuantizedCheckpoint
    file: Path


def export(model: Path, folder: Path, preset: str) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", {})
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    tokenizer, out = Tokenizer.open(model), folder / "out"
    container.refuse(quantized.decoder, plan, tokenizer)
    file, *_ = container.write(quantized, tokenizer, out, Deployment(CONTEXT))
    assert container.check(quantized, out).weights_digest == quantized.weights_digest
    return Exported(model, quantized, file)


@pytest.fixture(scope="module")
def small(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(make_model("llama", reward=True), tmp_path_factory.mktemp("small"), "int4")


@pytest.fixture
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Run packages in this process."""
    with jobs_at_hand("reference", "coreml"):
        yield


def texts(*lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(5, 400, length).tolist() for length in lengths]


def oracle(made: Exported, given: list[list[int]]) -> np.ndarray[Any, Any]:
    """Scores by transformers with the codes; each text alone."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        made.model, dtype=torch.float32, attn_implementation="eager"
    )
    names = [choice.weight.name for choice in made.quantized.plan.choices]
    state = {name: torch.from_numpy(np.array(made.quantized.rows(name))) for name in names}
    model.load_state_dict(state)
    with torch.inference_mode():
        found = [float(model(torch.tensor([text])).logits[0, 0]) for text in given]
    return np.array(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(
    family: str, make_model: Any, here: None, tmp_path: Path
) -> None:
    """Of one token, of texts longer than a window, and of the whole context."""
    preset, name, config = FAMILIES[family]
    made = export(make_model(name, reward=True, **config), tmp_path, preset)
    given = texts(1, 2, 23, 25, 60, CONTEXT)
    expected = oracle(made, given)
    assert np.ptp(expected) > 0.5
    exact = np.abs(np.array(coreml.scores(made.file, given, exact=True)) - expected).max()
    phone = np.abs(np.array(coreml.scores(made.file, given)) - expected).max()
    assert exact < 1e-5
    assert phone < 0.03


def test_the_last_token_that_is_no_padding_is_scored(small: Exported, here: None) -> None:
    assert json.loads((small.model / "config.json").read_text())["pad_token_id"] == PAD
    (text,) = texts(20)
    inside = [*text[:7], PAD, PAD, *text[7:]]
    given = [text, [*text, PAD], [*text, PAD, PAD, PAD], inside, [*inside, PAD], [PAD], [PAD, PAD]]
    found = np.array(coreml.scores(small.file, given, exact=True))
    assert np.abs(found - oracle(small, given)).max() < 2e-5
    assert found[0] == found[1] == found[2] and found[3] == found[4]
    assert abs(found[3] - found[0]) > 1e-3  # padding within a text is read


def test_texts_that_it_does_not_read_are_refused(small: Exported, here: None) -> None:
    with pytest.raises(BadInput, match="a text of 91 tokens is too long"):
        coreml.scores(small.file, texts(3, CONTEXT + 1))
    with pytest.raises(BadInput):
        coreml.scores(small.file, [[]])
    with pytest.raises(BadInput):
        coreml.scores(small.file, [])


def test_memory_is_what_the_program_says(small: Exported, here: None) -> None:
    memory = coreml.measure_scores(small.file, CONTEXT).memory
    weights = (small.file.parent / "weights" / "weight.bin").stat().st_size
    assert memory.kv_cache == 0 and memory.repacked == weights
    # a text of: four of the widest products, scores before and after the softmax; no logits
    assert memory.compute == 2 * CONTEXT * (4 * 96 + 2 * 4 * CONTEXT)


RECIPE = """\
model = "{model}"
name = "judge"
targets = ["pocket.toml"]
[quantize]
preset = "int8"
method = "rtn"
[texts]
eval = "pairs.jsonl"
[budgets]
pair_agreement = 0.5  # random weights
score_error = 1
"""
POCKET = 'extends = "{target}"\ncontext_length = 64\nprompt_lengths = [16, 32]\n'


def recipe(folder: Path, model: Path, target: str) -> Path:
    (folder / "pocket.toml").write_text(POCKET.format(target=target))
    rows = [
        {"prompt": f"Tell {number}", "chosen": " a story", "rejected": f" {number} lies"}
        for number in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "slimport.toml").write_text(RECIPE.format(model=model))
    return folder / "slimport.toml"


def test_a_bundle_is_judged(make_model: Any, here: None, run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path, make_model("llama", reward=True), "ios18-gpu")
    done = run("export", "--config", path, "-q")
    assert done.code == 0, done.err
    folder = tmp_path / "dist" / "pocket"
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["preference"]["held_out"]["pairs"] == 12 and report["errors"]["file"]
    assert report["errors"]["graph"]["score_max"] < 2e-5
    readme = (folder / "README.md").read_text()
    assert "reward model" in readme and "score" in readme
    assert run("verify", folder).code == 0 and run("check", folder).code == 0
    (job,) = run("export", "--config", path, "-q", "--dry-run", "--json").json["jobs"]
    assert job["files"] == {name: (folder / name).stat().st_size for name in job["files"]}


def test_the_neural_engine_does_not_score(make_model: Any, run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path, make_model("llama", reward=True), "ios18-ane")
    done = run("export", "--config", path, "-q")
    assert done.code == 5 and "container coreml-ane cannot hold a reward model" in done.err
    what, _, cure = done.err.strip().splitlines()
    assert "coreml-ane" in what and not (tmp_path / "dist").exists()
    words = cure.partition(": ")[2].partition(": ")[2].split()
    assert words[0] == "--container" and words[1] != "coreml-ane"
    for name in (words[1], "coreml"):
        done = run("export", "--config", path, "-q", "--dry-run", "--container", name)
        assert done.code == 0, done.err
