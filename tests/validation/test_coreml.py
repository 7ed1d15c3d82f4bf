"""Packages of Core ML in the interpreter, held to transformers; and in a Core ML that is faked."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, ValidationFailed
from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.export.coreml.proto import messages
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.windows import windows_of
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import conformance, judge
from slimport.validation.judge import Case
from slimport.validation.runtimes import coreml, coreml_worker, reference
from slimport.validation.runtimes.mil import Interpreter
from slimport.validation.runtimes.reference import Oracle

CONTEXT = 90
FLOATS = {"*proj*": "float16", "*embed_tokens*": "float16"}
LAYERED = {"num_hidden_layers": 3}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama in float16": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "yarn": ("llama", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "mistral with windows": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma 2": ("gemma2", LAYERED),
    "gemma 3": ("gemma3_text", {"num_hidden_layers": 7}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "phi3": ("phi3", {}),
    "phi3 that turns a half": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3 with windows": ("phi3", {"sliding_window": 24}),
    "phi3 of long texts": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONG,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the model file of its package."""

    model: Path
    quantized: QuantizedCheckpoint
    file: Path


def export(model: Path, folder: Path, preset: str = "int4", **patterns: str) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", patterns)
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    tokenizer, deployment = Tokenizer.open(model), Deployment(CONTEXT)
    container.refuse(quantized.decoder, plan, tokenizer)
    return Exported(model, quantized, container.write(quantized, tokenizer, folder, deployment)[0])


@pytest.fixture
def here(jobs_at_hand: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run packages in this process, by the interpreter: a Mac would run Core ML itself."""
    monkeypatch.setattr(coreml, "EXECUTES", False)
    with jobs_at_hand("reference", "coreml"):
        yield


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "PART", 32)


def windows(count: int = 2, length: int = 75) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(400, size=(count, length)).astype(np.int32)


def run(file: Path, out: Path, ids: np.ndarray[Any, Any], exact: bool = False) -> Any:
    (coreml.exact_logits if exact else coreml.logits)(file, ids, out)
    return np.load(out)


def meant(model: Exported, out: Path, ids: np.ndarray[Any, Any]) -> Any:
    """Logits of the codes by transformers."""
    reference.logits(Oracle(model.quantized.folder, quantized=True), ids, out)
    return np.load(out)


def divergence(expected: Any, found: Any) -> Any:
    """KL divergence at every position, in nats."""
    p, q = (
        each - np.logaddexp.reduce(each, -1, keepdims=True)
        for each in (expected.astype(np.float64), found.astype(np.float64))
    )
    return (np.exp(p) * (p - q)).sum(-1)


# The largest error of a logit in float32, and the mean divergence in float16, in nats: 9.5e-6 and
# 6.4e-6 were measured at most, but for Gemma, whose gelu and large embeddings make them (2.2e-5,
# 4.6e-5), (5.8e-5, 1.6e-4) and (1.2e-4, 4.6e-4).
NOISE = {"gemma": (4e-5, 7e-5), "gemma 2": (8e-5, 3e-4), "gemma 3": (2e-4, 7e-4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, make_model: Any, here: None, short_parts: None, tmp_path: Path
) -> None:
    """Prompts in parts, and single tokens after them, beyond the windows of those that have one."""
    name, config = FAMILIES[family]
    exact, rounded = NOISE.get(family, (1.5e-5, 1e-5))
    patterns = FLOATS if family == "llama in float16" else {}
    exported, ids = export(make_model(name, **config), tmp_path, **patterns), windows()
    expected = meant(exported, tmp_path / "expected.npy", ids)
    assert np.abs(expected).max() > 1
    found = run(exported.file, tmp_path / "exact.npy", ids, exact=True)
    assert np.abs(found - expected).max() < exact
    found = run(exported.file, tmp_path / "got.npy", ids)
    assert 1e-7 < divergence(expected, found).mean() < rounded


@pytest.fixture(scope="module")
def int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_llama, tmp_path_factory.mktemp("int4"))


@pytest.mark.parametrize("grid", ["int4-g32-signed", "int8-g32", "int2-g64", "nf4-g64"])
def test_every_grid_means_its_codes(grid: str, make_model: Any, here: None, tmp_path: Path) -> None:
    """In products and in look-ups."""
    found = export(make_model("llama"), tmp_path, **{"*": grid})
    ids = windows(1, 24)
    expected = meant(found, tmp_path / "expected.npy", ids)
    got = run(found.file, tmp_path / "got.npy", ids, exact=True)
    assert np.abs(got - expected).max() < 1.5e-5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_prompt_in_any_parts(family: str, make_model: Any, here: None, tmp_path: Path) -> None:
    """Gemma 2 has layers that see all, and layers that see the last 24 tokens."""
    config, noise = (LAYERED, 8e-5) if family == "gemma2" else ({}, 1e-5)  # 5.9e-5 and 5.2e-6
    exported = export(make_model(family, **config), tmp_path)
    (ids,) = windows(1, 60)
    text = coreml_worker._Text(exported.file, True, None)
    model = text._model
    whole = model.run(ids, 0)
    for cuts in ([1], [24, 25], [30], [59], range(1, 60)):
        text.reset()
        places = pairwise([0, *cuts, 60])
        parts = [model.run(ids[start:stop], start) for start, stop in places]
        assert np.abs(np.concatenate(parts) - whole).max() < noise


def test_greedy_tokens_are_those_of_transformers(
    make_model: Any, here: None, short_parts: None, tmp_path: Path
) -> None:
    model = export(make_model("llama", vocab_size=400), tmp_path)  # no rows that no token has
    prompts = [[1, 5, 7], [9], list(range(10, 75))]
    mine = coreml.generate(model.file, prompts, 12)
    oracle = Oracle(model.quantized.folder, quantized=True)
    ends = Tokenizer.open(model.model).eos_ids
    assert mine == reference.generate(oracle, prompts, 12, eos_ids=ends, threads=1)


def test_answers_end_at_a_stop_or_with_the_context(
    int4: Exported, here: None, tmp_path: Path
) -> None:
    (free,) = coreml.generate(int4.file, [[1, 5, 7]], 6)
    assert len(free.tokens) == 6 and not free.stopped
    place = next(n for n in range(1, 6) if free.tokens[n] not in free.tokens[:n])
    stop = free.tokens[place]
    file = copied(int4.file, tmp_path, {"slimport.stop_tokens": f"7,{stop}"})
    (ended,) = coreml.generate(file, [[1, 5, 7]], 6)
    assert ended.tokens == free.tokens[:place] and ended.stopped
    full, longest = coreml.generate(int4.file, [[5] * (CONTEXT - 2), [5] * CONTEXT], 12)
    assert (len(full.tokens), len(longest.tokens)) == (3, 1)
    with pytest.raises(BadInput, match="91 tokens is too long"):
        coreml.generate(int4.file, [[5] * (CONTEXT + 1)], 1)
    with pytest.raises(BadInput, match="91 tokens is too long"):
        run(int4.file, tmp_path / "o.npy", windows(1, CONTEXT + 1))


def copied(file: Path, folder: Path, told: dict[str, str]) -> Path:
    """A bundle whose model says something else of itself."""
    target = shutil.copytree(file.parents[3], folder / "copy", ignore=lambda *_: ["quantized"])
    copy = Path(target) / file.relative_to(file.parents[3])
    model = messages("Model").Model.FromString(copy.read_bytes())
    model.description.metadata.userDefined.update(told)
    copy.write_bytes(model.SerializeToString(deterministic=True))
    return copy


def case_of(model: Exported, file: Path) -> Case:
    return Case(
        file=file,
        adapter=None,
        oracle=Oracle(model.model),
        codes=Oracle(model.quantized.folder, quantized=True),
        tokenizer=Tokenizer.open(model.model),
        texts={judge.HELD_OUT: windows_of(windows(2, 48))},
        kv_cache="f16",
        context=64,
        prompt_lengths=[16],
        prompts={"one": [1, 2, 3]},
    )


def test_it_is_judged_without_being_executed(int4: Exported, here: None, tmp_path: Path) -> None:
    found = judge.judge(case_of(int4, int4.file), coreml, tmp_path, lambda *_: None)
    assert found.graph is not None and found.graph.kl_max < 1e-10
    assert 1e-7 < found.runtime.kl_mean < 1e-5 < found.quantization.kl_mean
    assert found.conformance.conforms and not found.measurements.speed


def test_what_runs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coreml.EXECUTES == (sys.platform == "darwin")
    monkeypatch.setattr(coreml, "EXECUTES", False)
    assert coreml.version().startswith("slimport's MIL interpreter with torch ")
    monkeypatch.setattr(coreml, "EXECUTES", True)
    assert coreml.version().startswith("Core ML of macOS ")
    assert coreml.version().endswith("with coremltools 9.0")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML executes it there")
def test_nobody_is_told_that_it_was_executed() -> None:
    assert "structure checked, not executed" in coreml.UNKNOWN[0]
    assert "iPhone" in coreml.UNKNOWN[-1] and len(coreml.UNKNOWN) == 2


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-2}, {"attention_scale": 0.26}], ids=["epsilon", "scale"]
)
def test_a_program_of_another_model_is_not_shipped(
    change: dict[str, Any], int4: Exported, here: None, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(
        int4.quantized, decoder=dataclasses.replace(int4.quantized.decoder, **change)
    )
    file = container.write(wrong, Tokenizer.open(int4.model), tmp_path, Deployment(64))[0]
    assert container.check(int4.quantized, tmp_path).digests  # its weights are those of the model
    with pytest.raises(ValidationFailed, match="computes another model"):
        judge.judge(case_of(int4, file), coreml, tmp_path, lambda *_: None)


def test_memory_is_what_the_program_says(int4: Exported, here: None) -> None:
    """By hand: 2 layers, 4 heads, 2 of them for keys of 16 numbers; runs of 90 tokens at most."""
    found = coreml.measure(int4.file, CONTEXT, [16])
    memory, weights = found.memory, int4.file.parent / "weights" / "weight.bin"
    assert memory.mapped == weights.stat().st_size + int4.file.stat().st_size
    assert memory.repacked == weights.stat().st_size
    assert memory.kv_cache == 2 * 2 * 2 * CONTEXT * 16 * 2  # both, layers, heads, float16
    logits, wide, scores = 416, 96, 4 * CONTEXT  # numbers of a token; up_proj makes the most
    assert memory.compute == CONTEXT * 2 * (logits + 4 * wide + 2 * scores)
    assert (found.speed, found.rss_anon, found.rss_file) == ((), None, None)
    assert coreml.memory_on(int4.file, ["arm64"], memory) == memory


def test_the_vocabulary_and_the_tokenizer(int4: Exported, here: None) -> None:
    tokenizer = Tokenizer.open(int4.model)
    found = conformance.check(tokenizer, int4.file, coreml)
    assert found.conforms and found.checked > 60 and not found.further_stops
    read = coreml.vocabulary(int4.file)
    assert (read.size, read.eog, read.bos) == (400, tokenizer.eos_ids, tokenizer.bos_id)
    assert read.adds_bos is True and read.chat_template == tokenizer.chat_template
    text = "He'll tell you: 12345 piñas! <|im_end|>"
    assert coreml.tokenize(int4.file, [text, ""]) == [tokenizer.encode(text), []]


def test_a_stop_that_is_missed_is_found(int4: Exported, here: None, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(int4.model)
    file = copied(int4.file, tmp_path, {"slimport.stop_tokens": str(tokenizer.eos_ids[0])})
    with pytest.raises(ValidationFailed, match=f"stop at token {tokenizer.eos_ids[1]}"):
        conformance.check(tokenizer, file, coreml)


@pytest.mark.parametrize(
    ("weight", "factor", "said"),
    [
        ("mlp.up_proj", 3e4, "linear model_layers_0_mlp_up_proj computes numbers"),
        ("mlp.gate_proj", 2e3, "mul layers_0_network_inner computes numbers"),
        ("self_attn.q_proj", 2e4, "linear model_layers_0_self_attn_q_proj computes numbers"),
    ],
)
def test_numbers_beyond_float16_are_not_shipped(
    weight: str, factor: float, said: str, tiny_llama: Path, here: None, tmp_path: Path
) -> None:
    """The operation that makes them first is named; float32 would not show it."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.0.{weight}.weight"] *= factor
    if weight == "mlp.gate_proj":
        tensors["model.layers.0.mlp.up_proj.weight"] *= 300
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    exported, ids = export(model, tmp_path), windows(1, 24)
    assert np.isfinite(meant(exported, tmp_path / "expected.npy", ids)).all()
    with pytest.raises(ValidationFailed) as failure:
        run(exported.file, tmp_path / "got.npy", ids)
    assert failure.value.what.startswith(said)
    assert "float16 ends at 65504" in failure.value.why
    with pytest.raises(ValidationFailed, match="do not fit float16"):
        coreml.generate(exported.file, [[1, 5, 7]], 2)


def test_files_that_are_not_there_or_damaged(int4: Exported, here: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file"):
        run(tmp_path / "model.mlmodel", tmp_path / "o.npy", windows())
    file = copied(int4.file, tmp_path, {})
    whole = file.read_bytes()
    for content in (b"nothing", whole[:1000]):
        file.write_bytes(content)
        with pytest.raises((BadInput, ValidationFailed)):
            run(file, tmp_path / "o.npy", windows())
    file.write_bytes(whole)
    (file.parent / "weights" / "weight.bin").write_bytes(bytes(64))
    with pytest.raises(ValidationFailed):
        run(file, tmp_path / "o.npy", windows())


def test_a_child_answers(int4: Exported, tmp_path: Path, capfd: Any) -> None:
    assert run(int4.file, tmp_path / "o.npy", windows(1, 8), exact=True).shape == (1, 8, 416)
    assert capfd.readouterr() == ("", "")


class FakeModel:
    """coremltools' MLModel on a Mac, over the interpreter; it keeps what it is asked for."""

    made: ClassVar[list[FakeModel]] = []
    _framework_error: ClassVar[Exception | None] = None

    def __init__(self, path: str, compute_units: str, function_name: str | None) -> None:
        self.path, self.units, self.function = path, compute_units, function_name
        self.interpreter = Interpreter(Path(path), function_name, rounding="fp16")
        self.states: list[object] = []
        self.runs: list[tuple[int, dict[str, tuple[Any, ...]]]] = []
        FakeModel.made.append(self)

    def get_spec(self) -> Any:
        file = Path(self.path) / "Data/com.apple.CoreML/model.mlmodel"
        return messages("Model").Model.FromString(file.read_bytes())

    def make_state(self) -> object:
        self.states.append(object())
        return self.states[-1]

    def predict(self, given: dict[str, Any], state: object) -> dict[str, Any]:
        place = self.states.index(state)
        if not self.runs or self.runs[-1][0] != place:
            self.interpreter.reset()
        self.runs.append((place, {key: (x.dtype, x.shape) for key, x in given.items()}))
        if given["inputIds"].max() >= 416:
            raise RuntimeError("Error computing NN outputs.\nmore")
        found = self.interpreter.run({key: torch.from_numpy(x) for key, x in given.items()})
        return {key: each.numpy().astype(np.float16) for key, each in found.items()}


@pytest.fixture
def mac(here: None, monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """As if Core ML were here; the models that it loads."""
    fake = ModuleType("coremltools")
    fake.models = SimpleNamespace(MLModel=FakeModel)  # type: ignore[attr-defined]
    fake.ComputeUnit = SimpleNamespace(CPU_AND_GPU="GPU", CPU_AND_NE="ANE")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(coreml, "EXECUTES", True)
    monkeypatch.setattr(FakeModel, "made", [])
    return FakeModel.made


def test_core_ml_is_given_what_the_package_takes(
    make_model: Any,
    mac: list[FakeModel],
    short_parts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state for each text, and inputs by their names: as the code of the README does."""
    exported, ids = export(make_model("gemma2", **LAYERED), tmp_path), windows(2, 40)
    found = run(exported.file, tmp_path / "mac.npy", ids)
    (model,) = mac
    assert model.path == str(tmp_path / "Model.mlpackage")
    assert (model.units, model.function) == ("GPU", None)
    texts = {1: [(32, 32), (4, 36), (1, 37), (1, 38), (1, 39), (1, 40)], 2: [(32, 32), (8, 40)]}
    parts = [(place, *part) for place, each in texts.items() for part in each]
    for (state, given), (place, count, total) in zip(model.runs, parts, strict=True):
        assert state == place
        mask = (np.float16, (1, 1, count, total))
        assert given == {
            "inputIds": (np.int32, (1, count)),
            "fullAttentionMask": mask,
            "slidingAttentionMask": mask,
        }
    monkeypatch.setattr(coreml, "EXECUTES", False)
    np.testing.assert_array_equal(found, run(exported.file, tmp_path / "here.npy", ids))
    assert len(mac) == 1


def test_on_a_mac_the_interpreter_still_proves_the_graph(
    int4: Exported, mac: list[FakeModel], tmp_path: Path
) -> None:
    expected = meant(int4, tmp_path / "expected.npy", windows(1, 24))
    found = run(int4.file, tmp_path / "exact.npy", windows(1, 24), exact=True)
    assert np.abs(found - expected).max() < 1.5e-5 and not mac
    (free,) = coreml.generate(int4.file, [[1, 5, 7]], 4)
    assert len(free.tokens) == 4 and len(mac) == 1


def test_what_core_ml_refuses_is_told(int4: Exported, mac: list[FakeModel]) -> None:
    with pytest.raises(ValidationFailed, match="Core ML cannot run the package") as failure:
        coreml.generate(int4.file, [[1, 416]], 4)
    assert failure.value.why == "it says: Error computing NN outputs."


@pytest.mark.parametrize("said", ["it does not compile", "no state"])
def test_a_package_that_core_ml_does_not_load(
    said: str, int4: Exported, mac: list[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools only warns when it makes the model; some releases have no states."""

    def no_state(model: FakeModel) -> object:
        raise Exception("no state")

    if said == "no state":
        monkeypatch.setattr(FakeModel, "make_state", no_state)
    else:
        monkeypatch.setattr(FakeModel, "_framework_error", RuntimeError(said))
    with pytest.raises(
        ValidationFailed, match=r"Core ML does not load Model\.mlpackage"
    ) as failure:
        coreml.generate(int4.file, [[1, 5, 7]], 4)
    assert failure.value.why == f"it says: {said}"


def test_inputs_are_those_of_the_function_that_runs() -> None:
    """A model of several has none of its own, and coremltools tells only those."""
    description = messages("Model").ModelDescription(defaultFunctionName="base")
    for name in ("tone", "base"):
        description.functions.add(name=name).input.add(name=f"ids of {name}")
    for function, name in ((None, "base"), ("tone", "tone")):
        (given,) = coreml_worker._described(description, function).input
        assert given.name == f"ids of {name}"
