"""Separate LoRA files: base and adapter in ONNX Runtime beside base and adapter in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as genai
import pytest
import torch

from slimport.architectures import Kind
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import onnx as container
from slimport.export.container import Deployment
from slimport.export.onnx import layout
from slimport.export.onnx.adapter import read_adapter
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import onnxruntime

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

FLOAT = {"*": "float16"}
LINEARS = {Kind.Q, Kind.K, Kind.V, Kind.ATTENTION_OUTPUT, Kind.GATE, Kind.UP, Kind.DOWN}
Adapted = tuple[str, dict[str, Any], dict[str, Any]]


def write(model: Any, folder: Path, target: Path, kinds: set[Kind] = LINEARS) -> Path:
    deployment = Deployment(64, frozenset(kinds))
    target.mkdir(exist_ok=True)
    return container.write(model, Tokenizer.open(folder), target, deployment)[0]


def logits(model: Any, tokens: np.ndarray[Any, Any]) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def test_onnxruntime_applies_what_peft_trained(
    adapted: Adapted,
    make_model: Any,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "FLOAT_MATRIX", "<f4")
    family, overrides, settings = adapted
    folder = make_model(family, **overrides)
    oracle = train_adapter(folder, tmp_path / "peft", settings)
    model = in_memory(folder, patterns=FLOAT)
    adapter = read_tone(folder, tmp_path / "peft", model.decoder)
    if "embed_tokens" in settings["target_modules"]:
        with pytest.raises(Unsupported, match="only the matrices of decoder layers"):
            container.refuse_adapter(adapter)
        return
    base = write(model, folder, tmp_path / "base")
    file = container.write_adapter(adapter, model.base(), tmp_path)
    predicted = container.predict_adapter(adapter, model.base())
    assert predicted == {"tone.onnx_adapter": file.stat().st_size}
    container.check_adapter(file, adapter, model.base())
    tokens = np.random.default_rng(2).integers(0, 416, (1, 48), dtype=np.int32)
    expected = logits(oracle, tokens)
    onnxruntime.logits(base, tokens, tmp_path / "o.npy", adapter=file)
    assert np.abs(np.load(tmp_path / "o.npy") - expected).max() < 3e-5
    with oracle.disable_adapter():
        plain = logits(oracle, tokens)
    assert np.abs(plain - expected).max() > 0.1  # the adapter does something
    onnxruntime.logits(base, tokens, tmp_path / "o.npy")
    assert np.abs(np.load(tmp_path / "o.npy") - plain).max() < 3e-5


@pytest.fixture(scope="module")
def two(
    tiny_llama: Path,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A float32 base with two adapters of different modules and ranks, and what peft says."""
    folder = tmp_path_factory.mktemp("two")
    tokens = np.random.default_rng(2).integers(0, 416, (1, 48), dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "FLOAT_MATRIX", "<f4")
        model = in_memory(tiny_llama, patterns=FLOAT)
        base = write(model, tiny_llama, folder / "base")
    settings = {
        "a": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "r": 4},
        "b": {"target_modules": ["k_proj", "v_proj"], "r": 12, "lora_alpha": 20},
    }
    files, expected = {}, {}
    for name, values in settings.items():
        oracle = train_adapter(tiny_llama, folder / f"peft-{name}", values)
        adapter = read_tone(tiny_llama, folder / f"peft-{name}", model.decoder)
        (folder / name).mkdir()
        files[name] = container.write_adapter(adapter, model.base(), folder / name)
        expected[name] = logits(oracle, tokens)
        with oracle.disable_adapter():
            expected["base"] = logits(oracle, tokens)
    return {"model": model, "base": base, "files": files, "tokens": tokens, "expected": expected}


def test_adapters_switch_in_one_session(two: dict[str, Any]) -> None:
    session = ort.InferenceSession(two["base"], providers=["CPUExecutionProvider"])
    feed = {
        "input_ids": two["tokens"].astype(np.int64),
        "attention_mask": np.ones(two["tokens"].shape, np.int64),
    }
    for one in session.get_inputs():
        if one.name.startswith("past"):
            feed[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    for name in ("base", "a", "b", "a", "base"):
        options, adapter = ort.RunOptions(), ort.LoraAdapter()
        if name != "base":
            adapter.Load(str(two["files"][name]))
            options.add_active_adapter(adapter)
        (found,) = session.run(["logits"], feed, options)
        assert np.abs(found - two["expected"][name]).max() < 1e-5, name


def test_adapters_switch_in_genai(two: dict[str, Any]) -> None:
    model = genai.Model(str(two["base"].parent))
    adapters = genai.Adapters(model)
    for name, file in two["files"].items():
        adapters.load(str(file), name)
    for name in ("base", "a", "b", "a", "base"):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=60, do_sample=False)
        generator = genai.Generator(model, params)
        if name != "base":
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(two["tokens"][0])
        found = np.array(generator.get_output("logits"))[0, -1]
        assert np.abs(found - two["expected"][name][0, -1]).max() < 1e-5, name
        generator.generate_next_token()
        assert generator.get_next_tokens()[0] == two["expected"][name][0, -1].argmax()


def test_an_adapter_of_another_base_is_refused_by_the_runtime_itself(
    two: dict[str, Any], tiny_llama: Path, read_tone: Any, tmp_path: Path
) -> None:
    model, folder = two["model"], two["files"]["a"].parent.parent / "peft-a"
    adapter = read_tone(tiny_llama, folder, model.decoder)
    other = "sha256:" + "cd" * 32
    file = container.write_adapter(adapter, model.base(other), tmp_path)
    container.refuse_foreign_adapter(file, other)
    with pytest.raises(BadInput, match="not an adapter of this base"):
        container.refuse_foreign_adapter(file, model.weights_digest)
    with pytest.raises(ValidationFailed, match="cannot run"):
        onnxruntime.logits(two["base"], two["tokens"], tmp_path / "o.npy", adapter=file)
    with pytest.raises(ValidationFailed, match="cannot continue"):
        onnxruntime.generate(two["base"], [[1, 2, 3]], 4, adapter=file)


def test_an_adapter_for_modules_that_the_base_does_not_offer_is_refused(
    two: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    narrow = write(two["model"], tiny_llama, tmp_path / "narrow", {Kind.K, Kind.V})
    with pytest.raises(ValidationFailed, match="cannot run"):
        onnxruntime.logits(narrow, two["tokens"], tmp_path / "o.npy", adapter=two["files"]["a"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}, "replaces"),
        ({"target_modules": ["embed_tokens"]}, "tied"),
    ],
)
def test_more_than_an_addition_is_refused(
    settings: dict[str, Any],
    why: str,
    tiny_llama: Path,
    in_memory: Any,
    train_adapter: Any,
    read_tone: Any,
    tmp_path: Path,
) -> None:
    train_adapter(tiny_llama, tmp_path, settings)
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    with pytest.raises(Unsupported, match=why):
        container.refuse_adapter(adapter)
    with pytest.raises(Unsupported, match="--adapter-mode merged"):
        container.write_adapter(adapter, model.base(), tmp_path)
    assert not list(tmp_path.glob("*.onnx_adapter"))


def test_a_damaged_or_partial_file_is_noticed(
    tiny_llama: Path, in_memory: Any, train_adapter: Any, read_tone: Any, tmp_path: Path
) -> None:
    train_adapter(tiny_llama, tmp_path, {"target_modules": ["q_proj", "v_proj"], "r": 4})
    model = in_memory(tiny_llama)
    base = model.base("sha256:" + "ab" * 32)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    file = container.write_adapter(adapter, base, tmp_path, 0.5)
    container.check_adapter(file, adapter, base, 0.5)
    with pytest.raises(ValidationFailed, match="other numbers"):
        container.check_adapter(file, adapter, base, 1.0)
    with pytest.raises(ValidationFailed, match="missing or left over"):
        container.check_adapter(file, adapter, model.base("sha256:" + "cd" * 32), 0.5)
    content = file.read_bytes()
    factor = next(iter(read_adapter(file).values())).tobytes()
    place = content.index(factor[:64])
    file.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :])
    with pytest.raises(ValidationFailed, match="other numbers"):
        container.check_adapter(file, adapter, base, 0.5)
    for damaged in (b"", b"nothing", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="not the adapter"):
            container.check_adapter(file, adapter, base, 0.5)


def test_two_writes_give_the_same_bytes(
    tiny_llama: Path, in_memory: Any, train_adapter: Any, read_tone: Any, tmp_path: Path
) -> None:
    train_adapter(tiny_llama, tmp_path, {"target_modules": "all-linear", "r": 4})
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    contents = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = container.write_adapter(adapter, model.base(), tmp_path / name)
        contents.add(file.read_bytes())
    assert len(contents) == 1
