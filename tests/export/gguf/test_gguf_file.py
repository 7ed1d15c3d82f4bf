"""Whole files: exact sizes, exact codes, and logits of transformers in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as upstream
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimport.architectures import FAMILIES, weights
from slimport.export import gguf
from slimport.export.gguf import layout
from slimport.export.gguf.metadata import rope_factors
from slimport.quantize.ggml import Type
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import llamacpp

FLOAT = {"*": "float16"}
Variant = tuple[str, dict[str, Any]]
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}


def export(model: Any, folder: Path, target: Path) -> Path:
    """Write the file and hold it to its predicted size."""
    tokenizer = Tokenizer.open(folder)
    predicted = gguf.predict(model.decoder, model.plan, tokenizer, model.name)
    (file,) = gguf.write(model, tokenizer, target)
    assert predicted == {file.name: file.stat().st_size}
    return file


def windows(vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(1).integers(0, vocabulary, (2, 64), dtype=np.int32)


def gelu_of_ggml(values: torch.Tensor) -> torch.Tensor:
    """GELU as ggml looks it up: a table of float16 for float16 (ggml's `ggml_vec_gelu_f32`).

    It moves these logits by up to 4e-2; with it in the oracle the rest is seen to be right.
    """
    found = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
    return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, found))


def oracle(folder: Path, tokens: np.ndarray[Any, Any], weights: dict[str, Any]) -> Any:
    """transformers' logits in float32, with `weights` in place of the stored ones."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    for layer in model.model.layers:
        if "gemma" in model.config.model_type:
            layer.mlp.act_fn.forward = gelu_of_ggml
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def test_llama_cpp_computes_the_logits_of_transformers(
    variant: Variant,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Beside float16 weights ggml rounds activations to float16 too (8e-3 in these logits).
    monkeypatch.setattr(layout, "FLOAT_MATRIX", Type.F32)
    family, overrides = variant
    folder = make_model(family, **overrides)
    model = in_memory(folder, patterns=FLOAT)
    tokens = windows(model.decoder.vocab_size)[:, : gguf.context_length(model.decoder)]
    llamacpp.logits(export(model, folder, tmp_path), tokens, tmp_path / "o.npy", kv_cache="f32")
    difference = np.abs(np.load(tmp_path / "o.npy") - oracle(folder, tokens, model.tensors))
    if "gemma" not in family:
        assert difference.max() < 3e-5
        return
    # Where the last bit before ggml's table falls on the other side, float16 steps remain.
    assert difference.max() < 5e-3
    assert np.median(difference[:, 32:]) < 5e-4  # past the window


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        *((family, "int4") for family in FAMILIES),
        *(("llama", preset) for preset in ("int4-all", "int4-signed", "int8", "mixed", "int2")),
    ],
)
def test_every_code_comes_back(
    family: str, preset: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    tied = family != "olmo2" and preset != "int4-all"
    folder = make_model(family, tie_word_embeddings=tied, intermediate_size=128)
    model = in_memory(folder, preset)
    export(model, folder, tmp_path)
    found = gguf.check(model, tmp_path)
    digests = {}
    for name, tensor in gguf.read_back(tmp_path, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor)
            assert tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
        else:
            assert not isinstance(tensor, QuantizedTensor)
            largest = 2e-7 if "gemma" in family else 0  # 1 is added to the norms
            assert found.float_errors[name] <= largest
            assert np.abs(tensor - expected).max() <= largest
    assert set(found.float_errors) | set(digests) == {w.name for w in weights(model.decoder)}
    assert found.weights_digest == weights_digest(digests)
    assert found.digests == digests


def test_two_exports_have_the_same_bytes(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(export(in_memory(tiny_llama), tiny_llama, tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_gguf_py_reads_the_file(tiny_llama: Path, in_memory: Any, tmp_path: Path) -> None:
    model = in_memory(tiny_llama)
    read = upstream.GGUFReader(export(model, tiny_llama, tmp_path))
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert "output.weight" not in tensors  # tied: stored once
    for choice in model.plan.choices:
        tensor = tensors.pop(choice.weight.gguf)
        kind = (
            "F32" if not choice.weight.is_matrix else "Q8_0" if choice.weight.is_table else "Q4_0"
        )
        assert (tensor.tensor_type.name, tuple(tensor.shape[::-1])) == (kind, choice.weight.shape)
    assert not tensors
    table = model.tensors["model.embed_tokens.weight"]
    stored = {tensor.name: tensor for tensor in read.tensors}["token_embd.weight"]
    values = upstream.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(values, table.dequantize())


def test_metadata_is_what_llama_cpp_expects(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", rope_parameters=LINEAR)
    read = upstream.GGUFReader(export(in_memory(folder), folder, tmp_path))
    values = {key: field.contents() for key, field in read.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": folder.name,
        "general.file_type": 2,  # MOSTLY_Q4_0
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.vocab_size": 416,
    }
    assert expected.items() <= values.items()
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["my-Phi3-mini", "PHI-3"])
def test_a_name_that_llama_cpp_acts_on_is_left_out(
    name: str, tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    model = in_memory(tiny_llama)
    object.__setattr__(model, "name", name)
    read = upstream.GGUFReader(export(model, tiny_llama, tmp_path))
    assert "general.name" not in read.fields


def test_llama3_factors_are_those_of_transformers(
    make_model: Any, in_memory: Any, llama3: dict[str, Any]
) -> None:
    folder = make_model("llama", rope_parameters=llama3)
    config = in_memory(folder).decoder
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    expected = plain / model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(rope_factors(config.rope, 16), expected, rtol=1e-6)
    assert len(set(expected.round(3))) == 3  # kept, mixed and slowed frequencies
