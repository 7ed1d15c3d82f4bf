"""llama.cpp in its child process, held to transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput, DependencyMissing, EnvironmentFailed, ValidationFailed
from slimport.export.gguf.reader import open_gguf
from slimport.quantize import ggml
from slimport.validation import conformance
from slimport.validation.runtime import Memory
from slimport.validation.runtimes import (
    llamacpp,
    llamacpp_api,
    llamacpp_memory,
    reference,
)
from slimport.validation.runtimes.reference import Oracle


def windows(count: int = 3, length: int = 80, vocabulary: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(vocabulary, size=(count, length)).astype(np.int32)


def run(file: Path, out: Path, ids: np.ndarray, **options: object) -> np.ndarray:
    llamacpp.logits(file, ids, out, threads=1, **options)
    return np.load(out)


def test_logits_are_those_of_transformers(exported, at_hand, tmp_path):
    model = exported()
    ids = windows()
    got = run(model.file, tmp_path / "got.npy", ids, kv_cache="f32")
    codes = Oracle(model.quantized, quantized=True)  # its matrices are rounded to float16
    reference.logits(codes, ids, tmp_path / "want.npy", threads=1)
    want = np.load(tmp_path / "want.npy")
    assert got.dtype == np.float32 and got.shape == (3, 80, 416)
    assert want.std() > 0.5  # a flat model would agree with anything
    assert np.abs(got - want).max() < 1e-4


def test_long_windows_go_through_in_batches(exported, tmp_path):
    """A window is the same whatever came before it and however it is cut."""
    model = exported("llama", max_position_embeddings=1024)
    ids = windows(2, 700)
    got = run(model.file, tmp_path / "long.npy", ids, kv_cache="f32")
    start = run(model.file, tmp_path / "short.npy", ids[1:, :100], kv_cache="f32")
    assert np.abs(got[1, :100] - start[0]).max() < 1e-4


def test_threads_do_not_change_logits(exported, tmp_path):
    model = exported("llama", "int4")
    one = run(model.file, tmp_path / "one.npy", windows())
    llamacpp.logits(model.file, windows(), tmp_path / "two.npy", threads=2)
    assert np.array_equal(one, np.load(tmp_path / "two.npy"))


def test_cache_type_is_applied(exported, tmp_path):
    model = exported("qwen3")  # heads of 32: a q8_0 block
    exact = run(model.file, tmp_path / "a.npy", windows(), kv_cache="f32")
    half = run(model.file, tmp_path / "b.npy", windows(), kv_cache="f16")
    eight = run(model.file, tmp_path / "c.npy", windows(), kv_cache="q8_0")
    assert 0 < np.abs(half - exact).max() < np.abs(eight - exact).max()


def test_greedy_tokens_are_those_of_transformers(exported, at_hand):
    model = exported()
    prompts = [[1, 5, 7], [9], list(range(10, 60))]
    mine = llamacpp.generate(model.file, prompts, 12, kv_cache="f32", threads=1)
    theirs = reference.generate(Oracle(model.model), prompts, 12, threads=1)
    assert mine == theirs
    assert all(len(generation.tokens) == 12 or generation.stopped for generation in mine)


# a tokenizer, and the pre-tokenizer of llama.cpp that is nearest to its own
NEIGHBOURS = {
    "gpt2": "smollm",
    "llama3": "qwen2",
    "qwen2": "llama-bpe",
    "deepseek-v3": "deepseek-coder",
}


@pytest.mark.parametrize("tokenizer", ["spm", "gemma", *NEIGHBOURS])
def test_tokenizers_conform(exported, tokenizer):
    model = exported("llama", tokenizer=tokenizer)
    found = conformance.check(model.tokenizer, model.file, llamacpp)
    assert found.conforms and found.checked >= 60


@pytest.mark.parametrize("tokenizer", NEIGHBOURS)
def test_the_nearest_pre_tokenizer_does_not_conform(exported, tokenizer):
    model = exported("llama", pre=NEIGHBOURS[tokenizer], tokenizer=tokenizer)
    with pytest.raises(ValidationFailed, match="tokenizes"):
        conformance.check(model.tokenizer, model.file, llamacpp)


def test_vocabulary_is_read(exported):
    model = exported()
    found = llamacpp.vocabulary(model.file)
    assert found.size == 416
    assert set(model.tokenizer.eos_ids) <= set(found.eog)
    assert found.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("preset", ["int4", "int4-all", "int8", "Q4_K_M", "Q2_K", "IQ4_NL"])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_as_predicted_for_this_machine(exported, preset, tied):
    """Repacked bytes and the KV cache by formula, within the 0.01 MiB that llama.cpp logs."""
    model = exported("llama", preset, tie_word_embeddings=tied, vocab_size=4096, hidden_size=256)
    config = decoder_config(Checkpoint.open(model.model).config)
    found = llamacpp.measure(model.file, 300, [16], generated=2, threads=1)
    mapped, repacked = llamacpp_memory.weight_bytes(model.file, llamacpp_memory.isa_here())
    step = 0.005 * 2**20 + 4096
    assert abs(found.memory.mapped - mapped) <= step
    assert abs(found.memory.repacked - repacked) <= step
    assert abs(found.memory.kv_cache - llamacpp_memory.kv_cache_bytes(config, 300, "f16")) <= step
    assert found.memory.compute > 0


@pytest.mark.parametrize("tied", [True, False])
def test_phones_repack_what_this_machine_does_not(exported, tied):
    """Q8_0 is repacked on NEON with dot products; a tied table is repacked as the head."""
    model = exported("llama", "int8", vocab_size=4096, hidden_size=128, tie_word_embeddings=tied)
    tensors = open_gguf(model.file).tensors
    eight = sum(t.rows.nbytes for t in tensors.values() if t.type == ggml.Type.Q8_0)
    whole = sum(t.rows.nbytes for t in tensors.values())
    table = tensors["token_embd.weight"].rows.nbytes
    weight_bytes = llamacpp_memory.weight_bytes
    if tied:
        assert weight_bytes(model.file, ["arm64", "dotprod"]) == (whole, eight)
    else:  # the head stands last, so its original is no longer mapped once it is copied
        assert weight_bytes(model.file, ["arm64", "dotprod"]) == (whole - table, eight - table)
    assert weight_bytes(model.file, ["arm64"]) == (whole, 0)
    assert weight_bytes(model.file, ["avx2"]) == (whole, 0)


def test_memory_on_a_phone_changes_weights_only(exported):
    model = exported("llama", "int8", vocab_size=4096, hidden_size=128)
    here = Memory(mapped=1, repacked=2, kv_cache=3, compute=4)
    there = llamacpp.memory_on(model.file, ["arm64", "dotprod"], here)
    assert (there.kv_cache, there.compute) == (3, 4)
    assert (there.mapped, there.repacked) == llamacpp_memory.weight_bytes(model.file, ["dotprod"])
    assert there.total == there.mapped + there.anonymous


def test_speed_is_measured_for_prompts_that_fit(exported):
    model = exported("llama", "int4")
    done: list[tuple[int, int]] = []
    found = llamacpp.measure(
        model.file,
        256,
        [32, 64, 1000],
        generated=4,
        threads=1,
        progress=lambda *step: done.append(step),
    )
    assert [speed.prompt_tokens for speed in found.speed] == [32, 64]
    for speed in found.speed:
        assert 0 < speed.ttft_s < speed.total_s
        assert speed.prompt_tps == pytest.approx(speed.prompt_tokens / speed.ttft_s)
    assert done == [(1, 2), (2, 2)]
    assert found.rss_anon is None or found.rss_anon > 0


def test_a_cut_file_is_refused(exported, tmp_path):
    model = exported()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.file.read_bytes()[:-4096])
    with pytest.raises(ValidationFailed, match=r"does not load cut\.gguf") as caught:
        llamacpp.logits(cut, windows(), tmp_path / "out.npy")
    assert "corrupt" in caught.value.why or "bounds" in caught.value.why


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"no file gone\.gguf"):
        llamacpp.tokenize(tmp_path / "gone.gguf", ["x"])


def test_no_windows_and_empty_prompts_are_bad_input(exported, tmp_path):
    model = exported()
    with pytest.raises(BadInput, match="windows of shape"):
        llamacpp.logits(model.file, np.zeros((0, 8), np.int32), tmp_path / "out.npy")
    with pytest.raises(BadInput, match="empty prompt"):
        llamacpp.generate(model.file, [[1], []], 4)


def test_unwritable_logits_are_an_environment_error(exported, tmp_path):
    model = exported()
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        llamacpp.logits(model.file, windows(), tmp_path / "no-folder" / "out.npy", threads=1)


def test_another_release_is_refused_before_a_child_starts(exported, monkeypatch, tmp_path):
    model = exported()
    ggml.library.cache_clear()
    monkeypatch.setattr(ggml.metadata, "version", lambda name: "2026.10.1")
    with pytest.raises(DependencyMissing, match=r"2026\.10\.1 is installed") as caught:
        llamacpp.tokenize(model.file, ["x"])
    assert caught.value.exit_code == 6
    ggml.library.cache_clear()


@pytest.mark.parametrize("field", ["n_batch", "yarn_ext_factor", "type_k", "n_samplers"])
def test_other_structs_are_refused(field):
    """A field moved within the struct: defaults no longer stand where they should."""
    lib = llamacpp_api.library()
    moved = lib.llama_context_default_params()
    setattr(moved, field, 77)

    class Library:
        llama_model_default_params = lib.llama_model_default_params

        def llama_context_default_params(self):
            return moved

    with pytest.raises(DependencyMissing, match="other C structs") as caught:
        llamacpp_api.probe(Library())
    assert "77" in caught.value.why
