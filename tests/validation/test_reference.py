"""The oracle is transformers and peft, and nothing else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimport.errors import BadInput
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.tensor import QuantizedTensor
from slimport.validation import divergence
from slimport.validation.runtimes import llamacpp, reference
from slimport.validation.runtimes.reference import Oracle

# peft reads a property that transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def windows(count=3, length=40):
    rng = np.random.default_rng(0)
    return rng.integers(400, size=(count, length)).astype(np.int32)


def run(oracle, out, ids=None):
    reference.logits(oracle, windows() if ids is None else ids, out, threads=1)
    return np.load(out)


@torch.no_grad()
def transformers_logits(model, ids):
    return model.eval()(torch.from_numpy(ids).long()).logits.numpy()


def train(folder, target, **settings):
    """A PEFT folder with random weights, for the Linears q_proj and down_proj."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **settings)
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(target)
    return target


def test_the_child_answers_what_transformers_computes(make_model, tmp_path):
    """The one test of the real child process; the others run its jobs at hand."""
    folder = make_model("llama")
    done = []
    path = tmp_path / "out.npy"
    reference.logits(Oracle(folder), windows(), path, progress=lambda *step: done.append(step))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert np.abs(np.load(path) - transformers_logits(model, windows())).max() < 1e-4
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_an_adapter_is_applied_by_peft_with_its_scale(make_model, at_hand, tmp_path):
    folder = make_model("llama")
    adapter = train(folder, tmp_path / "adapter")
    base = run(Oracle(folder), tmp_path / "base.npy")
    none = run(Oracle(folder, adapter, scale=0.0), tmp_path / "none.npy")
    half = run(Oracle(folder, adapter, scale=0.5), tmp_path / "half.npy")
    assert np.array_equal(none, base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter)
    for layer in tuned.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B["default"].weight.data *= 0.5
    merged = transformers_logits(tuned.merge_and_unload(), windows())
    assert np.abs(half - merged).max() < 1e-4 < np.abs(half - base).max()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_head_that_the_adapter_trains_parts_from_a_tied_embedding(make_model, at_hand, tmp_path):
    folder = make_model("llama")
    adapter = train(folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    got = run(Oracle(folder, adapter), tmp_path / "got.npy")
    saved = load_file(adapter / "adapter_model.safetensors")
    (head,) = (value for name, value in saved.items() if "lm_head" in name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    hidden = tuned.eval().model(torch.from_numpy(windows()).long()).last_hidden_state
    expected = (hidden @ head.T).detach().numpy()
    assert np.abs(got - expected).max() < 1e-4
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert not torch.equal(head, table)


def test_codes_are_run_in_place_of_weights(exported, at_hand, tmp_path):
    model = exported("llama", "int4")
    got = run(Oracle(model.quantized, quantized=True), tmp_path / "codes.npy")
    checkpoint = QuantizedCheckpoint.open(model.quantized)
    plain = AutoModelForCausalLM.from_pretrained(model.model, dtype=torch.float32)
    for name in checkpoint.names():
        weight = checkpoint.load(name)
        values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        plain.get_parameter(name).data.copy_(torch.from_numpy(np.array(values)))
    assert np.abs(got - transformers_logits(plain, windows())).max() < 1e-4
    assert np.abs(got - run(Oracle(model.model), tmp_path / "full.npy")).max() > 0.1


def test_codes_of_an_untied_head_stay_apart(exported, at_hand, tmp_path):
    model = exported("llama", "int8", tie_word_embeddings=False)
    got = run(Oracle(model.quantized, quantized=True), tmp_path / "codes.npy")
    assert np.abs(got - run(Oracle(model.model), tmp_path / "full.npy")).max() < 1


def test_the_three_errors_add_up(exported, at_hand, tmp_path):
    model = exported("llama", "int4")
    full, codes, artifact = (tmp_path / f"{name}.npy" for name in ("full", "codes", "artifact"))
    run(Oracle(model.model), full)
    run(Oracle(model.quantized, quantized=True), codes)
    llamacpp.logits(model.file, windows(), artifact, threads=1)
    quantization = divergence.compare(full, codes, windows()).kl_mean
    runtime = divergence.compare(codes, artifact, windows()).kl_mean
    whole = divergence.compare(full, artifact, windows()).kl_mean
    assert 0 < runtime < quantization / 4
    assert abs(whole - quantization) < quantization / 4


def test_generation_stops_before_an_end(make_model, at_hand):
    oracle, prompt = Oracle(make_model("llama")), [[1, 5, 7]]
    (free,) = reference.generate(oracle, prompt, 12, eos_ids=[], threads=1)
    assert len(free.tokens) == 12 and not free.stopped
    end = free.tokens[3]
    (cut,) = reference.generate(oracle, prompt, 12, eos_ids=[end], threads=1)
    assert cut.tokens == free.tokens[: free.tokens.index(end)] and cut.stopped


def test_ends_are_read_from_the_folder(make_model, at_hand, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    (free,) = reference.generate(Oracle(folder), [[1, 5, 7]], 8, eos_ids=[], threads=1)
    settings = {"eos_token_id": [free.tokens[0]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (cut,) = reference.generate(Oracle(folder), [[1, 5, 7]], 8, threads=1)
    assert cut.tokens == () and cut.stopped


def test_samples_are_seeded_and_follow_the_model(make_model, at_hand):
    oracle = Oracle(make_model("llama"))
    first, again, other = (reference.sample(oracle, 3, 20, 24, s, threads=1) for s in (0, 0, 1))
    assert first.shape == (20, 24) and first.dtype == np.int32
    assert (first[:, 0] == 3).all() and 0 <= first.min() and first.max() < 416
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    many = reference.sample(oracle, 3, 400, 2, 0, threads=1)[:, 1]
    model = AutoModelForCausalLM.from_pretrained(oracle.folder, dtype=torch.float32)
    logits = transformers_logits(model, np.array([[3]], np.int32))[0, 0]
    likely = np.argsort(logits)[-104:]  # the likelier quarter of the vocabulary
    share = float(torch.from_numpy(logits).softmax(-1)[likely.copy()].sum())
    assert np.isin(many, likely).mean() == pytest.approx(share, abs=0.08)


def test_a_missing_weight_is_bad_input(make_model, at_hand, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BadInput, match="does not load") as caught:
        run(Oracle(folder), tmp_path / "out.npy")
    assert "9 weights missing" in caught.value.why


def test_a_missing_adapter_is_bad_input(make_model, at_hand, tmp_path):
    with pytest.raises(BadInput, match="adapter does not load"):
        run(Oracle(make_model("llama"), tmp_path), tmp_path / "out.npy")


def test_an_empty_prompt_is_bad_input(make_model):
    with pytest.raises(BadInput, match="empty prompt"):
        reference.generate(Oracle(make_model("llama")), [[]], 4)
