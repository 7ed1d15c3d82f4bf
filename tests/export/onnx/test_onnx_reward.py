"""Reward models: one score for each text, as transformers computes it, at the same token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from slimport.architectures import FAMILIES, reward_config
from slimport.errors import Unsupported, ValidationFailed
from slimport.export import onnx as container
from slimport.export.container import Deployment
from slimport.export.onnx import layout
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import onnxruntime

Variant = tuple[str, dict[str, Any]]
Texts = list[list[int]]


def export(model: Any, source: Path, folder: Path) -> Path:
    container.write(model, Tokenizer.open(source), folder, Deployment(256))
    return folder / container.FILE


def texts(vocabulary: int, lengths: tuple[int, ...] = (40, 7, 90, 23)) -> Texts:
    """Ids without those of special tokens, padding among them."""
    draw = np.random.default_rng(2).integers
    return [draw(vocabulary // 2, vocabulary, length).tolist() for length in lengths]


def expected(oracle: Any, folder: Path, model: Any, rows: Texts) -> list[float]:
    """transformers' score of each text alone."""
    return [float(oracle(folder, np.array([row]), model.tensors)[0, 0]) for row in rows]


def batched(file: Path, rows: Texts, filler: int) -> list[float]:
    """All texts in one run, filled up at their ends."""
    length = max(map(len, rows))
    ids = np.array([row + [filler] * (length - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found: list[float] = session.run(None, {"input_ids": ids, "attention_mask": mask})[0].tolist()
    return found


def test_onnxruntime_computes_the_scores_of_transformers(
    variant: Variant,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Any,
) -> None:
    monkeypatch.setattr(layout, "FLOAT_MATRIX", "<f4")
    family, overrides = variant
    if FAMILIES[family].classifier is None:
        config = json.loads((make_model(family) / "config.json").read_text())
        with pytest.raises(Unsupported, match="cannot be a reward model"):
            reward_config(config)
        return
    folder = make_model(family, reward=True, **overrides)
    model = in_memory(folder, patterns={"*": "float16"})
    if model.decoder.rope.share != 1 and "rope_parameters" in overrides:
        with pytest.raises(Unsupported, match="cannot rotate 12 numbers"):
            container.refuse(model.decoder, model.plan, Tokenizer.open(folder))
        return
    rows = texts(model.decoder.vocab_size)
    wanted = expected(oracle, folder, model, rows)
    file = export(model, folder, tmp_path)
    tolerance = 2e-5 * max(1.0, *map(abs, wanted))
    assert onnxruntime.scores(file, rows) == pytest.approx(wanted, abs=tolerance)
    assert batched(file, rows, filler=9) == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("pad", [2, None])
def test_the_score_is_that_of_the_last_token_which_is_no_padding(
    pad: int | None, make_model: Any, in_memory: Any, tmp_path: Path, oracle: Any
) -> None:
    folder = make_model("llama", reward=True, pad_token_id=pad)
    model = in_memory(folder, patterns={"*": "int8-row"})
    assert model.decoder.pad_id == pad
    start = texts(model.decoder.vocab_size, (30,))[0]
    rows = [start, [*start, 2], [*start, 2, 2], [*start, 2, 7], [*start, 2, 7, 2]]
    wanted = expected(oracle, folder, model, rows)
    if pad is None:
        assert len({round(score, 3) for score in wanted}) == len(rows)
    else:
        assert wanted[1:3] == pytest.approx([wanted[0]] * 2, abs=1e-5)
        assert wanted[4] == pytest.approx(wanted[3], abs=1e-5)
    file = export(model, folder, tmp_path)
    assert onnxruntime.scores(file, rows, exact=True) == pytest.approx(wanted, abs=1e-4)
    shipped = onnxruntime.scores(file, rows)
    assert batched(file, rows, filler=5) == pytest.approx(shipped, abs=1e-5)


@pytest.mark.parametrize("patterns", [{}, {"*": "int4-g32-signed"}, {"*": "int2-g64"}])
def test_exact_scores_are_those_of_the_codes(
    patterns: dict[str, str], make_model: Any, in_memory: Any, tmp_path: Path, oracle: Any
) -> None:
    folder = make_model("qwen2", reward=True, hidden_size=128, intermediate_size=128)
    model = in_memory(folder, patterns=patterns)
    file = export(model, folder, tmp_path)
    read_back = container.check(model, tmp_path)
    assert read_back.weights_digest == model.weights_digest
    assert read_back.float_errors["score.weight"] == 0
    rows = texts(model.decoder.vocab_size)
    wanted = expected(oracle, folder, model, rows)
    assert onnxruntime.scores(file, rows, exact=True) == pytest.approx(wanted, abs=1e-4)
    sizes = container.predict(
        model.decoder, model.plan, Tokenizer.open(folder), model.name, Deployment(256)
    )
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


def test_another_score_head_is_found(make_model: Any, in_memory: Any, tmp_path: Path) -> None:
    folder = make_model("llama", reward=True)
    model = in_memory(folder)
    export(model, folder, tmp_path)
    tensors = {**model.tensors, "score.weight": model.tensors["score.weight"] + 1e-3}
    with pytest.raises(ValidationFailed, match=r"score\.weight"):
        container.check(dataclasses.replace(model, tensors=tensors), tmp_path)


def test_genai_reads_the_tokenizer_of_a_reward_model(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", reward=True)
    file = export(in_memory(folder), folder, tmp_path)
    tokenizer = Tokenizer.open(folder)
    words = ["Once upon a time", "<|end|>"]
    assert onnxruntime.tokenize(file, words) == [tokenizer.encode(text) for text in words]
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    assert "search" not in settings and settings["model"]["decoder"]["outputs"] == {
        "logits": "score"
    }


def test_scoring_is_measured(make_model: Any, in_memory: Any, tmp_path: Path) -> None:
    folder = make_model("llama", reward=True)
    file = export(in_memory(folder), folder, tmp_path)
    found = onnxruntime.measure_scores(file, 128, (32, 64, 256))
    assert [speed.prompt_tokens for speed in found.speed] == [32, 64]
    assert all(speed.generation_tps is None and speed.ttft_s > 0 for speed in found.speed)
    assert found.memory.kv_cache == 0 and found.memory.compute > 0


def test_a_file_that_is_no_model_is_refused(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", reward=True)
    file = export(in_memory(folder), folder, tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValidationFailed, match="does not load"):
        onnxruntime.scores(file, [[1, 2]])
