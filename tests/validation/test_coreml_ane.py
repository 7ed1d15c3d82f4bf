"""Packages for the Neural Engine by the interpreter, held to transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, ValidationFailed
from slimport.export import coreml_ane as container
from slimport.export.container import Deployment
from slimport.export.coreml_ane import layout
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import conformance
from slimport.validation.runtimes import coreml, coreml_ane

pytestmark = pytest.mark.skipif(coreml.EXECUTES, reason="Core ML itself would run the packages")

CONTEXT = 90  # no power of two: a state has room for 128
WINDOW = {"sliding_window": 24}
KV3 = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24, "hidden_size": 96}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("lut4", "llama", {}),
    "llama with biases": ("int8", "llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("lut4", "qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("int8", "qwen3", {}),
    "olmo2": ("lut4", "olmo2", {}),
    "granite": ("int8", "granite", {}),
    "phi3 with a window": ("lut4", "phi3", WINDOW),
    "phi3 that turns a half": ("lut6", "phi3", {"partial_rotary_factor": 0.5}),
    "mistral with a window": ("int8", "mistral", WINDOW),
    "smollm3": ("lut4", "smollm3", {"num_hidden_layers": 5}),
    "three heads of 24": ("int8", "llama", KV3),
    "one head": ("lut6", "llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the first package made of it."""

    model: Path
    quantized: QuantizedCheckpoint
    file: Path


def export(model: Path, folder: Path, preset: str, context: int = CONTEXT) -> Exported:
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
    tokenizer, deployment = Tokenizer.open(model), Deployment(context)
    container.refuse(quantized.decoder, plan, tokenizer)
    file, *_ = container.write(quantized, tokenizer, folder / "out", deployment)
    return Exported(model, quantized, file)


@contextmanager
def small_packages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "parts", partial(layout.parts, limit=90_000))
        yield


@pytest.fixture(scope="module")
def small(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_llama, tmp_path_factory.mktemp("small"), "lut4")


@pytest.fixture(scope="module")
def halves(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Five layers and a tied table, in two packages."""
    model = make_model("llama", num_hidden_layers=5)
    with small_packages():
        made = export(model, tmp_path_factory.mktemp("halves"), "lut4")
    assert (made.file.parents[3] / "Model_2.mlpackage").is_dir()
    return made


@pytest.fixture
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Run packages in this process."""
    with jobs_at_hand("coreml"):
        yield


def windows(count: int = 2, length: int = 75, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(400, size=(count, length)).astype(np.int32)


def half(number: float) -> float:
    return float(np.float16(number))


def oracle(made: Exported, rounded: bool = False) -> Any:
    """transformers with the codes; `rounded`: with float16 constants, as the packages have them."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        made.model, dtype=torch.float32, attn_implementation="eager"
    )
    quantized, state = made.quantized, {}
    for choice in quantized.plan.choices:
        values = torch.from_numpy(np.array(quantized.rows(choice.weight.name)))
        kept = choice.grid is not None or not rounded
        state[choice.weight.name] = values if kept else values.half().float()
    if quantized.decoder.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    if rounded:
        model.model.rotary_emb.register_forward_hook(
            lambda module, given, made: tuple(each.half().float() for each in made)
        )
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = half(module.variance_epsilon)
            if hasattr(module, "scaling") and hasattr(module, "o_proj"):
                exact = 1 / half(1 / module.scaling)
                same = abs(exact - module.scaling) < 1e-9
                module.scaling = module.scaling if same else half(module.scaling)
    return model.eval()


def logits(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(torch.from_numpy(ids).long()).logits.numpy()
    return found


def divergence(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """Nats at the worst token."""
    p, q = (torch.from_numpy(each).double().log_softmax(-1) for each in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).max())


def exactly(made: Exported, ids: np.ndarray[Any, Any], out: Path) -> np.ndarray[Any, Any]:
    assert coreml_ane.exact_logits(made.file, ids, out) == coreml.ROUNDED
    found: np.ndarray[Any, Any] = np.load(out)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, make_model: Any, here: None, tmp_path: Path
) -> None:
    """A chunk, a part of one, and single tokens after it.

    To 3e-5 of a transformers whose constants are float16 too; measured were 1.2e-5.
    """
    preset, name, config = FAMILIES[family]
    made = export(make_model(name, **config), tmp_path, preset)
    ids, plain = windows(), oracle(made)
    expected = logits(plain, ids)
    found = exactly(made, ids, tmp_path / "found.npy")
    same = np.abs(found - logits(oracle(made, rounded=True), ids)).max()
    nats = divergence(expected, found)
    coreml_ane.logits(made.file, ids, tmp_path / "half.npy")
    phone = divergence(expected, np.load(tmp_path / "half.npy"))
    assert np.abs(expected).max() > 1
    assert same < 3e-5
    assert nats < 2e-5
    assert phone < 2e-4


def test_packages_follow_one_another(halves: Exported, here: None, tmp_path: Path) -> None:
    ids = windows()
    found = exactly(halves, ids, tmp_path / "found.npy")
    assert np.abs(found - logits(oracle(halves, rounded=True), ids)).max() < 3e-5


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 68, 69, CONTEXT])
def test_texts_of_every_length(length: int, small: Exported, here: None, tmp_path: Path) -> None:
    """One token; a chunk to the token; the whole context, of which the last chunk is cut."""
    ids = windows(2, length)
    found = exactly(small, ids, tmp_path / "found.npy")
    assert np.abs(found - logits(oracle(small, rounded=True), ids)).max() < 3e-5


def test_the_end_of_a_context_that_fills_its_state(
    make_model: Any, here: None, tmp_path: Path
) -> None:
    """Positions up to the last one that there is room, and a turn, for."""
    for context in (64, 128):
        made = export(make_model("qwen2"), tmp_path / str(context), "int8", context)
        ids = windows(2, context)
        found = exactly(made, ids, tmp_path / "found.npy")
        assert np.abs(found - logits(oracle(made, rounded=True), ids)).max() < 3e-5


def test_a_vocabulary_that_nothing_divides(make_model: Any, here: None, tmp_path: Path) -> None:
    """Rows of a table on int8-row; of a head in 4 bits they would stay float16."""
    made = export(make_model("llama", vocab_size=419), tmp_path, "lut4")
    ids = windows()
    ids[0, :2] = 418
    found = exactly(made, ids, tmp_path / "found.npy")
    assert found.shape == (2, 75, 419)
    assert np.abs(found - logits(oracle(made, rounded=True), ids)).max() < 3e-5


def test_a_text_longer_than_the_context_is_refused(
    small: Exported, here: None, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="91 tokens is too long"):
        coreml_ane.logits(small.file, windows(1, CONTEXT + 1), tmp_path / "o.npy")


def greedy(made: Exported, prompt: list[int], count: int) -> list[int]:
    """Tokens by transformers, none of which float16 could decide otherwise."""
    model, text = oracle(made), list(prompt)
    stops = Tokenizer.open(made.model).eos_ids
    while len(text) < len(prompt) + count and len(text) <= CONTEXT:
        row = logits(model, np.array([text]))[0, -1]
        second, first = np.sort(row)[-2:]
        assert first - second > 0.05
        if int(row.argmax()) in stops:
            break
        text.append(int(row.argmax()))
    return text[len(prompt) :]


def test_generation_is_that_of_transformers(halves: Exported, small: Exported, here: None) -> None:
    """Over the end of a chunk, by packages one after the other, and to the end of the context."""
    given = ((halves, 60, 12, 1), (small, 3, 9, 0), (small, CONTEXT - 4, 20, 1))
    for made, length, count, seed in given:
        (prompt,) = windows(1, length, seed).tolist()
        expected = greedy(made, prompt, count)
        assert len(expected) == min(count, CONTEXT + 1 - length)
        (found,) = coreml_ane.generate(made.file, [prompt], count)
        assert list(found.tokens) == expected and not found.stopped


def test_memory_is_what_the_program_says(small: Exported, halves: Exported, here: None) -> None:
    memory = coreml_ane.measure(small.file, CONTEXT, [16]).memory
    folder = small.file.parent
    weights = (folder / "weights" / "weight.bin").stat().st_size
    assert memory.repacked == weights
    assert memory.mapped == weights + small.file.stat().st_size
    assert memory.kv_cache == 2 * 4 * 2 * 128 * 32  # float16: rows, heads, positions, size
    # a chunk of: logits, four of the widest products, scores before and after the softmax
    assert memory.compute == 2 * 64 * (416 + 4 * 96 + 2 * 4 * 128)
    assert coreml_ane.memory_on(small.file, ["arm64"], memory) == memory
    memory = coreml_ane.measure(halves.file, CONTEXT).memory
    both = [*halves.file.parents[3].glob("*.mlpackage/Data/*/weights/weight.bin")]
    assert len(both) == 2 and memory.repacked == sum(path.stat().st_size for path in both)
    assert memory.kv_cache == 2 * 10 * 2 * 128 * 32


def test_all_of_it_is_for_the_neural_engine(small: Exported, halves: Exported) -> None:
    for made in (small, halves):
        found = coreml_ane.accelerator(made.file)
        assert found.to_json() == {"npu_nodes": 1.0, "npu_weight_bytes": 1.0}
        assert not found.findings


def test_the_vocabulary_and_the_tokenizer(small: Exported, here: None) -> None:
    tokenizer = Tokenizer.open(small.model)
    found = conformance.check(tokenizer, small.file, coreml_ane)
    assert found.conforms and found.checked > 60
    read = coreml_ane.vocabulary(small.file)
    assert (read.eog, read.bos) == (tokenizer.eos_ids, tokenizer.bos_id)


def test_numbers_beyond_float16_are_refused(make_model: Any, here: None, tmp_path: Path) -> None:
    made = export(make_model("llama", seed=3), tmp_path, "int8")
    weight = made.file.parent / "weights" / "weight.bin"
    content, scale = bytearray(weight.read_bytes()), np.float16(500).tobytes()
    part = layout.parts(made.quantized.decoder, made.quantized.plan, Deployment(CONTEXT))[0]
    for tensor in part.layout.tensors:
        if "up_proj.scale" in tensor.name:
            content[tensor.offset : tensor.offset + tensor.nbytes] = scale * (tensor.nbytes // 2)
    weight.write_bytes(bytes(content))
    with pytest.raises(ValidationFailed, match="do not fit float16"):
        coreml_ane.logits(made.file, windows(1, 8), tmp_path / "o.npy")


def test_a_child_answers(small: Exported, tmp_path: Path, capfd: Any) -> None:
    coreml_ane.logits(small.file, windows(1, 8), tmp_path / "o.npy")
    assert np.load(tmp_path / "o.npy").shape == (1, 8, 416)
    assert capfd.readouterr() == ("", "")
