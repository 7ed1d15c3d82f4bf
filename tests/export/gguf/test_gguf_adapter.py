"""Separate LoRA files: base and adapter in llama.cpp beside base and adapter in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export import gguf
from slimport.export.gguf import layout
from slimport.export.gguf.reader import open_gguf
from slimport.quantize.ggml import Type
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import llamacpp

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about tied tables, rightly

BASE = "sha256:" + "ab" * 32
Adapted = tuple[str, dict[str, Any], dict[str, Any]]


def test_llama_cpp_applies_what_peft_trained(
    adapted: Adapted,
    make_model: Any,
    in_memory: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_adapter: Any,
    read_tone: Any,
) -> None:
    monkeypatch.setattr(layout, "FLOAT_MATRIX", Type.F32)
    family, overrides, settings = adapted
    folder = make_model(family, **overrides)
    oracle = train_adapter(folder, tmp_path / "peft", settings)
    model = in_memory(folder, patterns={"*": "float16"})
    adapter = read_tone(folder, tmp_path / "peft", model.decoder)
    (base,) = gguf.write(model, Tokenizer.open(folder), tmp_path)
    file = gguf.write_adapter(adapter, model.base(BASE), tmp_path)
    assert gguf.predict_adapter(adapter, model.base()) == {"tone.gguf": file.stat().st_size}
    gguf.check_adapter(file, adapter, model.base(BASE))

    tokens = np.random.default_rng(2).integers(0, 416, (1, 48), dtype=np.int32)
    with torch.inference_mode():
        expected = oracle(torch.from_numpy(tokens).long()).logits.numpy()
        with oracle.disable_adapter():
            plain = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    llamacpp.logits(base, tokens, tmp_path / "o.npy", kv_cache="f32", adapter=file)
    difference = np.abs(np.load(tmp_path / "o.npy") - expected).max()
    assert difference < 3e-5
    assert np.abs(plain - expected).max() > 0.1  # the adapter does something


def test_memory_counts_a_separate_adapter(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, train_adapter: Any, read_tone: Any
) -> None:
    train_adapter(
        tiny_llama, tmp_path / "peft", {"target_modules": ["v_proj", "down_proj"], "r": 64}
    )
    model = in_memory(tiny_llama)
    (base,) = gguf.write(model, Tokenizer.open(tiny_llama), tmp_path)
    adapter = read_tone(tiny_llama, tmp_path / "peft", model.decoder)
    file = gguf.write_adapter(adapter, model.base(BASE), tmp_path)
    alone = llamacpp.measure(base, 64, [16], generated=2, threads=1).memory
    beside = llamacpp.measure(base, 64, [16], generated=2, threads=1, adapter=file).memory
    stored = sum(tensor.rows.nbytes for tensor in open_gguf(file).tensors.values())
    assert alone.adapter == 0 and "adapter" not in alone.to_json()
    assert abs(beside.adapter - stored) <= 0.005 * 2**20 + 1  # the log says 0.01 MiB
    assert beside.anonymous >= alone.anonymous + beside.adapter


def test_alpha_over_rank_is_one_where_all_ranks_are_equal(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, train_adapter: Any, read_tone: Any
) -> None:
    """So a reader that takes alpha / rank as the whole scale is right too."""
    train_adapter(tiny_llama, tmp_path, {"target_modules": ["k_proj"], "r": 4, "lora_alpha": 12})
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    file = open_gguf(gguf.write_adapter(adapter, model.base(BASE), tmp_path))
    assert file.metadata["adapter.lora.alpha"] == 4
    assert file.metadata["general.type"] == "adapter"
    delta = adapter.deltas["model.layers.0.self_attn.k_proj.weight"]
    stored = file.tensors["blk.0.attn_k.weight.lora_b"].rows.view("<f4")
    np.testing.assert_array_equal(stored[:4], 3 * delta.b[[0, 8, 1, 9]])  # rotary pairs together


def test_the_factor_of_the_command_line_is_in_the_file(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, train_adapter: Any, read_tone: Any
) -> None:
    """llama.cpp, README.md and the judge all apply a separate adapter with scale 1."""
    train_adapter(tiny_llama, tmp_path, {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 12})
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    (tmp_path / "half").mkdir()
    files = (
        open_gguf(gguf.write_adapter(adapter, model.base(BASE), tmp_path)),
        open_gguf(gguf.write_adapter(adapter, model.base(BASE), tmp_path / "half", 0.5)),
    )
    whole, half = (file.tensors["blk.0.attn_v.weight.lora_b"].rows.view("<f4") for file in files)
    np.testing.assert_array_equal(half, whole / 2)
    assert np.abs(whole).max() > 0


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
    tmp_path: Path,
    train_adapter: Any,
    read_tone: Any,
) -> None:
    train_adapter(tiny_llama, tmp_path, settings)
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    with pytest.raises(Unsupported, match=why):
        gguf.refuse_adapter(adapter)
    with pytest.raises(Unsupported, match="--adapter-mode merged"):
        gguf.write_adapter(adapter, model.base(BASE), tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_another_file_than_the_adapter_is_noticed(
    tiny_llama: Path, in_memory: Any, tmp_path: Path, train_adapter: Any, read_tone: Any
) -> None:
    train_adapter(tiny_llama, tmp_path, {"target_modules": ["q_proj", "v_proj"], "r": 4})
    model = in_memory(tiny_llama)
    adapter = read_tone(tiny_llama, tmp_path, model.decoder)
    file = gguf.write_adapter(adapter, model.base(BASE), tmp_path, 0.5)
    gguf.refuse_foreign_adapter(file, BASE)
    with pytest.raises(BadInput, match="not an adapter of this base"):
        gguf.refuse_foreign_adapter(file, "sha256:" + "1" * 64)
    gguf.check_adapter(file, adapter, model.base(BASE), 0.5)
    for base, scale in (("sha256:" + "cd" * 32, 0.5), (BASE, 1.0)):
        with pytest.raises(ValidationFailed, match="tone"):
            gguf.check_adapter(file, adapter, model.base(base), scale)
    nothing = gguf.write_adapter(adapter, model.base(BASE), tmp_path, 0.0)
    gguf.check_adapter(nothing, adapter, model.base(BASE), 0.0)
    file = gguf.write_adapter(adapter, model.base(BASE), tmp_path, 0.5)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 0x80  # the sign of the last number
    file.write_bytes(damaged)
    with pytest.raises(ValidationFailed, match="tone"):
        gguf.check_adapter(file, adapter, model.base(BASE), 0.5)
