"""ONNX Runtime and genai in their child process, held to transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_file
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, DependencyMissing, Unsupported, ValidationFailed
from slimport.export import onnx
from slimport.export.container import Deployment
from slimport.export.onnx import layout
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.windows import windows_of
from slimport.shipping import containers
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import judge
from slimport.validation.judge import Case
from slimport.validation.runtimes import onnxruntime, onnxruntime_worker, reference
from slimport.validation.runtimes.reference import Oracle

Export = Callable[..., "Exported"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and model.onnx made of it."""

    model: Path
    quantized: QuantizedCheckpoint
    file: Path


def export(model: Path, folder: Path, context: int = 256, **patterns: str) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), "int4", "rtn", patterns)
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    file = onnx.write(quantized, Tokenizer.open(model), folder, Deployment(context))[0]
    return Exported(model, quantized, file)


@pytest.fixture(scope="module")
def floats(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every weight in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "FLOAT_MATRIX", "<f4")
        return export(make_model("qwen3"), tmp_path_factory.mktemp("floats"), **{"*": "float16"})


@pytest.fixture(scope="module")
def int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_llama, tmp_path_factory.mktemp("int4"))


def windows(count: int = 2, length: int = 150) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(400, size=(count, length)).astype(np.int32)


def run(file: Path, out: Path, ids: np.ndarray[Any, Any], **options: Any) -> Any:
    onnxruntime.logits(file, ids, out, **options)
    return np.load(out)


def test_a_window_is_the_same_however_it_is_cut(
    floats: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(floats.file, tmp_path / "whole.npy", windows())
    alone = run(floats.file, tmp_path / "alone.npy", windows()[1:, :60])
    assert np.abs(whole[1, :60] - alone[0]).max() < 1e-4
    monkeypatch.setattr(onnxruntime_worker, "_LOGITS", 1)  # 32 tokens at a time
    arguments = {"out": str(tmp_path / "cut.npy"), "exact": False, "adapter": None}
    onnxruntime_worker._logits(str(floats.file), windows().tolist(), threads=1, **arguments)
    assert np.abs(whole - np.load(tmp_path / "cut.npy")).max() < 1e-4


def test_threads_do_not_change_logits(int4: Exported, tmp_path: Path) -> None:
    one = run(int4.file, tmp_path / "one.npy", windows(), threads=1)
    assert np.array_equal(one, run(int4.file, tmp_path / "two.npy", windows(), threads=2))


def test_greedy_tokens_are_those_of_transformers(floats: Exported, at_hand: None) -> None:
    prompts = [[1, 5, 7], [9], list(range(10, 60))]
    mine = onnxruntime.generate(floats.file, prompts, 12)
    theirs = reference.generate(Oracle(floats.model), prompts, 12, threads=1)
    assert mine == theirs


def test_a_generation_ends_where_the_model_says(floats: Exported, tmp_path: Path) -> None:
    """Each id of eos_token_id ends it, and is no token of the answer."""
    (plain,) = onnxruntime.generate(floats.file, [[1, 5, 7]], 6)
    shutil.copytree(floats.file.parent, tmp_path / "ends", dirs_exist_ok=True)
    path = tmp_path / "ends" / "genai_config.json"
    content = json.loads(path.read_text())
    content["model"]["eos_token_id"] = [*content["model"]["eos_token_id"], plain.tokens[2]]
    path.write_text(json.dumps(content))
    (ended,) = onnxruntime.generate(tmp_path / "ends" / "model.onnx", [[1, 5, 7]], 6)
    place = plain.tokens.index(plain.tokens[2])
    assert ended.stopped and ended.tokens == plain.tokens[:place]


def test_measurements(int4: Exported) -> None:
    found = onnxruntime.measure(int4.file, 200, [16, 64, 199], generated=4)
    assert [speed.prompt_tokens for speed in found.speed] == [16, 64]  # 199 leaves room for one
    for speed in found.speed:
        assert 0 < speed.ttft_s < speed.total_s
    memory = found.memory
    assert memory.kv_cache == 2 * 2 * 2 * 16 * 200 * 4  # both, layers, heads, size, tokens, float32
    codes = sum(t.nbytes for t in layout.layout(*plan_of(int4), Deployment(1)).tensors)
    assert memory.repacked > codes / 2 and memory.adapter == 0
    assert memory.compute > 128 * 416 * 4  # logits of a run
    assert found.rss_anon is None or found.rss_anon > memory.kv_cache


def plan_of(model: Exported) -> tuple[Any, Any]:
    return model.quantized.decoder, model.quantized.plan


@pytest.fixture
def here(jobs_at_hand: Any) -> Iterator[None]:
    """Run graphs in this process."""
    with jobs_at_hand("reference", "onnxruntime"):
        yield


def case(model: Exported, file: Path) -> Case:
    return Case(
        file=file,
        adapter=None,
        oracle=Oracle(model.model),
        codes=Oracle(model.quantized.folder, quantized=True),
        tokenizer=Tokenizer.open(model.model),
        texts={judge.HELD_OUT: windows_of(windows(2, 48))},
        kv_cache="f32",
        context=64,
        prompt_lengths=[16],
        prompts={"one": [1, 2, 3]},
    )


def test_exact_products_are_judged(int4: Exported, here: None, tmp_path: Path) -> None:
    found = judge.judge(case(int4, int4.file), onnxruntime, tmp_path, lambda *_: None)
    assert found.graph is not None and found.graph.kl_max < 1e-9
    assert found.graph.tokens == 48
    assert found.runtime.kl_mean > 100 * found.graph.kl_mean  # int8 activations cost something
    assert found.conformance.conforms


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-2},
        {"attention_scale": 0.26},
        {"heads": 4, "kv_heads": 2, "context_length": 128, "windowed": (True, False), "window": 24},
    ],
    ids=["epsilon", "scale", "window"],
)
def test_a_graph_of_another_model_is_not_shipped(
    change: dict[str, Any], int4: Exported, here: None, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(
        int4.quantized, decoder=dataclasses.replace(int4.quantized.decoder, **change)
    )
    file = onnx.write(wrong, Tokenizer.open(int4.model), tmp_path, Deployment(64))[0]
    onnx.check(wrong, tmp_path)  # every code is there
    with pytest.raises(ValidationFailed, match="computes another model"):
        judge.judge(case(int4, file), onnxruntime, tmp_path, lambda *_: None)


def test_damaged_files_are_refused(int4: Exported, here: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file"):
        run(tmp_path / "model.onnx", tmp_path / "o.npy", windows())
    shutil.copytree(int4.file.parent, tmp_path / "copy")
    data = tmp_path / "copy" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    for job in (
        lambda: run(tmp_path / "copy" / "model.onnx", tmp_path / "o.npy", windows()),
        lambda: onnxruntime.generate(tmp_path / "copy" / "model.onnx", [[1]], 2),
    ):
        with pytest.raises(ValidationFailed, match="does not load"):
            job()
    (tmp_path / "copy" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ValidationFailed, match="does not load"):
        run(tmp_path / "copy" / "model.onnx", tmp_path / "o.npy", windows())


def test_nf4_is_mapped_and_made_float32_for_a_product(make_model: Any, tmp_path: Path) -> None:
    folder = make_model("llama", intermediate_size=128)
    made = export(folder, tmp_path, **{"*.layers.*": "nf4-g64"})
    memory = onnxruntime.measure(made.file, 64, (16,)).memory
    layers = sum(
        np.prod(choice.weight.shape)
        for choice in made.quantized.plan.quantized
        if choice.weight.is_linear
    )
    stored = layers // 2 + layers // 64 * 4  # codes, and a float32 scale for each group
    assert memory.mapped > stored > memory.repacked  # which is of the head alone
    assert memory.compute > 4 * 64 * 128


def test_another_provider_is_a_failure(int4: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime_worker.ort.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda self: ["OtherProvider", "CPU"])
    with pytest.raises(ValidationFailed, match="other providers than it was told"):
        onnxruntime_worker._Session(int4.file, 1, False)


def test_the_session_is_told_what_the_manifest_states(int4: Exported) -> None:
    stated = onnxruntime.SESSION
    told = onnxruntime_worker._Session(int4.file, 2, False).session.get_session_options()
    for key, value in stated["config_entries"].items():
        assert told.get_session_config_entry(key) == value
    assert told.graph_optimization_level.name == stated["graph_optimization_level"]
    assert told.execution_mode.name == stated["execution_mode"]
    assert (told.intra_op_num_threads, told.inter_op_num_threads) == (2, 1)
    graph = onnx_file.load_model(int4.file, load_external_data=False).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {stated["accuracy_level"]["logits"]}


def test_empty_requests_are_refused(int4: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be run"):
        run(int4.file, tmp_path / "o.npy", np.zeros((0, 4), np.int32))
    with pytest.raises(BadInput, match="empty prompt"):
        onnxruntime.generate(int4.file, [[]], 4)


def test_a_missing_library_stops_its_container_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("onnx_ir") or "export.onnx" in name:
            raise ImportError("No module named 'onnx_ir'")
        return real(name, *arguments, **keywords)

    for module in [m for m in sys.modules if m.startswith("slimport.export.onnx")]:
        monkeypatch.delitem(sys.modules, module)
    import slimport.export

    monkeypatch.delattr(slimport.export, "onnx")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyMissing, match="container onnx cannot be used") as failure:
        containers.load("onnx")
    assert failure.value.exit_code == 6
    assert containers.load("gguf").container.NAME == "gguf"
    with pytest.raises(Unsupported, match="no container x"):
        containers.load("x")
