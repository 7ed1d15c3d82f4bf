"""Tokenizers and models that GGUF holds, and those it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as upstream
import pytest

from slimport.architectures import decoder_config
from slimport.errors import BadInput, Unsupported
from slimport.export import gguf
from slimport.export.gguf.vocabulary import ENDS, vocabulary_metadata
from slimport.quantize.plan import make_plan
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes import llamacpp

SHARED = Path(__file__).parents[3] / "../shared/models"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.open(tiny_llama)


def with_tokens(folder: Path, target: Path, tokens: list[str]) -> Path:
    """A copy of a model's folder whose tokenizer has more special tokens."""
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    spec = json.loads(path.read_text())
    template = spec["added_tokens"][0]
    for index, token in enumerate(tokens, start=400):
        spec["added_tokens"].append(template | {"id": index, "content": token})
    path.write_text(json.dumps(spec))
    return target


def test_a_byte_level_tokenizer(tokenizer: Tokenizer) -> None:
    values = vocabulary_metadata(tokenizer, 416)
    tokens = values["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == 416
    assert tokens[:5] == ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[399:401] == ["<tool_call>", "[PAD400]"]
    kinds = values["tokenizer.ggml.token_type"]
    normal, control, user_defined, unused = 1, 3, 4, 5
    assert [kinds[i] for i in (0, 5, 399, 400)] == [control, normal, user_defined, unused]
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.merges"] == tokenizer.merges()
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    assert "tokenizer.ggml.scores" not in values


def test_a_sentencepiece_tokenizer(make_model: Any) -> None:
    values = vocabulary_metadata(Tokenizer.open(make_model("llama", tokenizer="spm")), 416)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert len(values["tokenizer.ggml.scores"]) == 416
    assert "tokenizer.ggml.merges" not in values


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen2", "spm"])
def test_llama_cpp_reads_the_tokenizer_as_it_is(
    style: str, make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", tokenizer=style)
    tokenizer = Tokenizer.open(folder)
    (file,) = gguf.write(in_memory(folder), tokenizer, tmp_path)
    found = llamacpp.vocabulary(file)
    assert found.size == 416
    assert found.eog == tuple(sorted(tokenizer.eos_ids))
    assert len(found.eog) == 2
    assert found.adds_bos == tokenizer.adds_bos
    assert found.chat_template == tokenizer.chat_template
    texts = tokenizer.conformance_texts()
    assert llamacpp.tokenize(file, texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("name", ["manpages-3.7M", "stories_char105", "stories260K"])
def test_a_real_model_comes_back_with_its_tokenizer(
    name: str, in_memory: Any, tmp_path: Path
) -> None:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip("the shared models are not here")
    model, tokenizer = in_memory(folder), Tokenizer.open(folder)
    predicted = gguf.predict(model.decoder, model.plan, tokenizer, model.name)
    (file,) = gguf.write(model, tokenizer, tmp_path)
    assert predicted == {"model.gguf": file.stat().st_size}
    assert set(gguf.check(model, tmp_path).digests) == set(model.grids)
    texts = tokenizer.conformance_texts()
    assert llamacpp.tokenize(file, texts) == [tokenizer.encode(text) for text in texts]
    assert set(tokenizer.eos_ids) <= set(llamacpp.vocabulary(file).eog)


def test_the_known_ends_are_those_of_llama_cpp(
    tiny_llama: Path, in_memory: Any, tmp_path: Path
) -> None:
    """Every text in ENDS stops llama.cpp without a key of its own."""
    # Beside these, llama.cpp takes <|end|> and </s> off its list (for gpt-oss and gemma 4).
    odd = {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"}
    model = in_memory(tiny_llama)
    for name, tokens in (("usual", ENDS - odd - {"<|im_end|>"}), ("odd", odd)):
        folder = with_tokens(tiny_llama, tmp_path / name, sorted(tokens))
        tokenizer = replace(Tokenizer.open(folder), eos_ids=(1,))
        (file,) = gguf.write(model, tokenizer, folder)
        ids = set(range(400, 400 + len(tokens))) | {1, 4}  # <|eos|> by its key, <|im_end|>
        assert set(llamacpp.vocabulary(file).eog) == ids


def test_ends_without_a_known_text_get_the_keys(tokenizer: Tokenizer) -> None:
    # 4 is <|im_end|>, which llama.cpp knows; the others it does not.
    values = vocabulary_metadata(replace(tokenizer, eos_ids=(1, 4, 20, 21)), 416)
    keys = {role: values.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
    assert keys == {"eos": 1, "eot": 20, "eom": 21}


def test_more_ends_than_keys_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Unsupported, match="5 tokens end a generation"):
        vocabulary_metadata(replace(tokenizer, eos_ids=(1, 4, 20, 21, 22)), 416)


def test_a_model_without_an_end_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Unsupported, match="no token ends"):
        vocabulary_metadata(replace(tokenizer, eos_ids=()), 416)


def test_a_template_with_a_bos_token_needs_one(tokenizer: Tokenizer) -> None:
    without = replace(tokenizer, bos_id=None, adds_bos=False)
    with pytest.raises(Unsupported, match="bos_token"):
        vocabulary_metadata(without, 416)
    values = vocabulary_metadata(replace(without, chat_template=None), 416)
    assert "tokenizer.ggml.bos_token_id" not in values


def test_more_pieces_than_embeddings_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="399"):
        vocabulary_metadata(tokenizer, 399)


def test_two_pieces_of_one_text_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_tokens(tiny_llama, tmp_path / "model", ["[PAD401]"])
    with pytest.raises(Unsupported, match="1 pieces"):
        vocabulary_metadata(Tokenizer.open(folder), 416)


@pytest.mark.parametrize(
    ("family", "overrides", "preset", "why"),
    [
        ("llama", {"intermediate_size": 172}, "int8", "down_proj.* int8-row rows of 172"),
        ("qwen3", {"attention_bias": True}, "int4", "bias on the attention output"),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_theta": 10000.0,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "int4",
            "rope of type llama3",
        ),
        ("olmo2", {"tie_word_embeddings": True}, "int4", "one table for embedding and head"),
        ("gemma", {"tie_word_embeddings": False}, "int4", "a head of its own"),
        ("qwen2", {"head_dim": 32}, "int4", "heads whose size is not"),
        ("phi3", {"head_dim": 32}, "int4", "heads whose size is not"),
        ("gemma2", {"num_hidden_layers": 46}, "int4", "attention scaled by another factor"),
        ("gemma2", {"attn_logit_softcapping": None}, "int4", "that are not capped"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "int4", "attention scaled by another factor"),
        (
            "gemma2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "int4",
            "other layers than every second",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 20.0}, "int4", "attention scores capped"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "int4",
            "windows that follow no period",
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, "int4", "not rotated but every fourth"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_before_work(
    family: str, overrides: dict[str, Any], preset: str, why: str, make_model: Any
) -> None:
    folder = make_model(family, **overrides)
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    with pytest.raises(Unsupported, match=why):
        gguf.refuse(config, make_plan(config, preset, "rtn"), Tokenizer.open(folder))


def test_float16_is_the_cure_for_rows_of_broken_blocks(
    make_model: Any, in_memory: Any, tmp_path: Path
) -> None:
    folder = make_model("llama", intermediate_size=172)
    model = in_memory(folder, "int8", {"*.down_proj.weight": "float16"})
    (file,) = gguf.write(model, Tokenizer.open(folder), tmp_path)
    assert set(gguf.check(model, tmp_path).digests) == set(model.grids)
    kinds = {t.name: t.tensor_type.name for t in upstream.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
