"""Whole decoders on the emulator of the NPU, beside transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import FAMILIES
from slimport.validation import divergence
from slimport.validation.runtimes import qnn as runtime

pytest.importorskip("onnxruntime_qnn")  # an extra, which `make setup` installs

WINDOW = {"sliding_window": 96}  # where the files' context ends
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
slow = pytest.mark.slow
CASES = [
    ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"head_dim": 32}),
    ("qwen3", {}),
    ("gemma2", WINDOW),
    ("granite", {}),
    ("phi3", {"head_dim": 32, "rope_parameters": PARTIAL}),
    ("smollm3", {}),
    pytest.param("olmo2", {}, marks=slow),
    pytest.param("llama", {"tie_word_embeddings": False, "rope_parameters": "llama3"}, marks=slow),
    pytest.param("mistral", WINDOW, marks=slow),
    pytest.param("gemma", {}, marks=slow),
    pytest.param("gemma3_text", {"num_hidden_layers": 7, **WINDOW}, marks=slow),
]


def diverges(
    file: Path, model: Any, source: Path, ids: Any, work: Path, oracle: Any
) -> divergence.Divergence:
    runtime.logits(file, ids, work / "npu.npy")
    np.save(work / "expected.npy", oracle(source, ids, model.tensors))
    return divergence.compare(work / "expected.npy", work / "npu.npy", ids)


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_the_npu_computes_the_logits_of_transformers(
    family: str,
    overrides: dict[str, Any],
    make_model: Any,
    in_memory: Any,
    export: Any,
    windows: Any,
    oracle: Any,
    llama3: dict[str, Any],
    tmp_path: Path,
) -> None:
    if overrides.get("rope_parameters") == "llama3":
        overrides = overrides | {"rope_parameters": llama3}
    source = make_model(family, **overrides)
    model = in_memory(source, "int8")
    file = export(model, source, tmp_path / "files")
    # 80 tokens: a chunk, a chunk that is filled up, and single tokens at the end.
    ids = windows(model.decoder.vocab_size, 1, 2, 80).ids
    found = diverges(file, model, source, ids, tmp_path, oracle)
    assert found.kl_mean < 2e-4 and found.kl_max < 1e-2 and found.top1 > 0.97, found


def test_every_family_that_is_not_refused_is_run() -> None:
    run = {getattr(case, "values", case)[0] for case in CASES}
    assert run == set(FAMILIES)


def test_four_bits_of_either_sign(
    make_model: Any, in_memory: Any, export: Any, windows: Any, tmp_path: Path, oracle: Any
) -> None:
    """Tables and Linears in int4: a looked-up embedding of two codes a byte, blocks of 32."""
    source = make_model("llama", tie_word_embeddings=False)
    model = in_memory(source, "int4-all", {"*mlp*": "int4-g32-signed", "*o_proj*": "int8-row"})
    file = export(model, source, tmp_path / "files", hexagon=81)
    ids = windows(model.decoder.vocab_size, 1, 2, 80).ids
    found = diverges(file, model, source, ids, tmp_path, oracle)
    assert found.kl_mean < 2e-4 and found.kl_max < 1e-2 and found.top1 > 0.97, found
