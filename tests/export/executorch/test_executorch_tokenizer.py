"""ExecuTorch's runner reads the tokenizer that is written for it: equal ids, or a refusal."""

# ruff: noqa: RUF001  (letters that look like others are the point)
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pytorch_tokenizers import pytorch_tokenizers_cpp
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from slimport.errors import BadInput, Unsupported
from slimport.export.executorch.tokenizer import refuse_tokenizer, tokenizer_json
from slimport.tokenizer import pretokenizers as known
from slimport.tokenizer.conformance import TEXTS
from slimport.tokenizer.tokenizer import Tokenizer

LETTERS = (
    *"aAbBéÉñяЯЖǅʰªːািกั你あا' s!_./½②٣€☃ßẞİıωΩﬁⅧⓐ1 23\n\t\r()|。、▁",
    *("ll", "\u0301", "\u200d", "\u00a0", "\u3000", "\u0085", "𝒜", "𐐀", "   ", "'re", "'S", "42"),
)
LONG = ["x" * 20000, "你好世界" * 5000, "1" * 20000, " " * 20000, "\n" * 500, "!a" * 5000]
BYTE_NAMES = ["<0x0A>", "<0x0A> b", "a<0xE2>", "<0x41><0x42>", "</s><0x0A></s>", " <0x0A>"]
ODD = ["a\0b", "'\u017fx", "a\u0870", "\x85\u2005", "e\u0301 \u00e9"]


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre.Split(Regex(regex), behavior, invert)


def to_bytes(use_regex: bool = False) -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# structure -> ignore_merges, steps
BYTE_LEVEL: dict[str, tuple[bool, list[Any]]] = {
    "gpt-2": (False, [to_bytes(True)]),
    "gpt-2 as a split": (False, [split(known.GPT2, "removed", True), to_bytes()]),
    "starcoder": (False, [pre.Digits(individual_digits=True), to_bytes(True)]),
    "llama 3": (True, [split(known.LLAMA3), to_bytes()]),
    "qwen2": (False, [split(known.QWEN2), to_bytes()]),
    "deepseek-v3": (False, [*map(split, known.DEEPSEEK_V3), to_bytes()]),
    "seed-coder": (False, [split(known.SEED_CODER), to_bytes()]),
    "jais-2": (False, [split(known.JAIS2), to_bytes()]),
    "qwen3.5": (False, [split(known.QWEN35), to_bytes()]),
    "exaone-moe": (False, [split(known.EXAONE_MOE), to_bytes()]),
    "minicpm5": (True, [split(known.THREE_DIGITS), split(known.MINICPM5), to_bytes()]),
}


def texts(count: int = 600) -> list[str]:
    random = Random(7)
    tangled = ["".join(random.choices(LETTERS, k=random.randint(2, 14))) for _ in range(count)]
    marks = [f"a{t}b {t} {t}{t}\n{t}" for t in ("</s>", "<tool_call>", "<tool", "</s")]
    return [*TEXTS, *LONG, *BYTE_NAMES, *ODD, *tangled, *marks]


@pytest.fixture(scope="module")
def merged() -> dict[str, Any]:
    """4000 pieces trained across every split; the first is a letter."""
    trained = Library(models.BPE())
    trained.pre_tokenizer = to_bytes()
    trained.train_from_iterator(
        [*texts(), *TEXTS * 4, "你好世界" * 3],
        BpeTrainer(vocab_size=4000, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False),
    )
    trained.decoder = decoders.ByteLevel()
    trained.add_special_tokens([AddedToken("</s>", normalized=False)])
    trained.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return dict(json.loads(trained.to_str()))


def byte_level(structure: str, spec: dict[str, Any]) -> dict[str, Any]:
    ignore_merges, steps = BYTE_LEVEL[structure]
    library = Library(models.BPE())
    library.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    written = json.loads(library.to_str())["pre_tokenizer"]
    return spec | {
        "pre_tokenizer": written,
        "model": spec["model"] | {"ignore_merges": ignore_merges},
    }


def opened(spec: dict[str, Any], folder: Path, pre: str | None = None) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer.open(folder, pre)


def in_the_runner(content: bytes, folder: Path) -> Any:
    """Its tokenizer, loaded."""
    (folder / "written.json").write_bytes(content)
    tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
    tokenizer.load(str(folder / "written.json"))
    return tokenizer


def hold(source: Tokenizer, folder: Path, given: list[str]) -> Any:
    """Compare ids of the source, of the written file in the tokenizers library, and in C++."""
    refuse_tokenizer(source, 1 << 20)
    content = tokenizer_json(source)
    assert content == tokenizer_json(source)
    again, runner = Library.from_str(content.decode()), in_the_runner(content, folder)
    for text in given:
        own = source.encode(text)
        assert own == again.encode(text, add_special_tokens=False).ids, ascii(text[:99])
        assert own == list(runner.encode(text)), ascii(text[:99])
    return runner


@pytest.mark.parametrize("structure", BYTE_LEVEL)
def test_ids_are_those_of_the_source(
    structure: str, merged: dict[str, Any], tmp_path: Path
) -> None:
    hold(opened(byte_level(structure, merged), tmp_path), tmp_path, texts())


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen2", "deepseek-v3", "spm", "gemma"])
def test_tokenizers_of_models(style: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """BOS where an app asks for it; each token decodes alone, its spaces kept."""
    source = Tokenizer.open(make_model("llama", tokenizer=style))
    normal = source.spec["normalizer"] != {"type": "NFC"}
    given = texts() if normal else [text for text in texts() if text.isascii()]
    runner = hold(source, tmp_path, given)
    assert list(runner.encode("a b", bos=1)) == source.encode("a b", add_special=True)
    ids = source.encode("two foxes\n in  there")
    assert "".join(runner.decode(one) for one in ids).lstrip() == "two foxes\n in  there"


def test_normalization_is_left_to_the_app(merged: dict[str, Any], tmp_path: Path) -> None:
    """The runner's NFC takes letters apart instead."""
    spec = byte_level("qwen2", merged) | {"normalizer": {"type": "NFC"}}
    source = opened(spec, tmp_path)
    runner = in_the_runner(tokenizer_json(source), tmp_path)
    assert list(runner.encode("\u00e9")) == source.encode("\u00e9") == source.encode("e\u0301")
    as_it_is = in_the_runner(json.dumps(spec).encode(), tmp_path)
    assert list(as_it_is.encode("\u00e9")) != source.encode("\u00e9")


@pytest.mark.parametrize("style", ["deepseek-v3", "qwen2", "gemma"])
def test_the_file_as_it_is_has_other_ids(
    style: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The tests fail once the runner does the same, and nothing has to be written anew."""
    source = Tokenizer.open(make_model("llama", tokenizer=style))
    runner = in_the_runner((source.folder / "tokenizer.json").read_bytes(), tmp_path)
    given = [*TEXTS, *BYTE_NAMES]
    assert any(source.encode(text) != list(runner.encode(text)) for text in given)


def test_a_strip_would_take_every_space(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = Tokenizer.open(make_model("llama", tokenizer="spm"))
    runner = in_the_runner((source.folder / "tokenizer.json").read_bytes(), tmp_path)
    assert "".join(map(runner.decode, source.encode("two foxes"))) == "twofoxes"


# ---- refusals ----


def refused(source: Tokenizer) -> str:
    with pytest.raises(Unsupported) as error:
        refuse_tokenizer(source, 1 << 20)
    assert len(str(error.value).splitlines()) == 3
    return str(error.value)


def test_a_token_without_a_row_is_refused(make_model: Callable[..., Path]) -> None:
    """The runner would sample among numbers that are no logits."""
    source = Tokenizer.open(make_model("llama"))
    tokens = source.library.get_vocab_size(with_added_tokens=True)
    refuse_tokenizer(source, tokens)
    with pytest.raises(BadInput):
        refuse_tokenizer(source, tokens - 1)


def test_ids_without_a_token_are_refused(merged: dict[str, Any], tmp_path: Path) -> None:
    """The runner counts tokens, and never gives an id beyond their number."""
    vocab = dict(merged["model"]["vocab"])
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 5
    spec = byte_level("qwen2", merged)
    spec["model"] = {**spec["model"], "vocab": vocab}
    assert "have no token" in refused(opened(spec, tmp_path))


def test_other_splits_are_refused_and_no_name_helps(merged: dict[str, Any], tmp_path: Path) -> None:
    spec = byte_level("gpt-2", merged)
    library = Library(models.BPE())
    library.pre_tokenizer = pre.Sequence([split(r" ?[^(\s|[.,!?])]+"), to_bytes()])
    spec |= {"pre_tokenizer": json.loads(library.to_str())["pre_tokenizer"]}
    assert "splits text with" in refused(opened(spec, tmp_path, pre="gpt-2"))


def test_a_piece_that_no_merge_makes_is_refused(merged: dict[str, Any], tmp_path: Path) -> None:
    vocab = merged["model"]["vocab"]
    model = merged["model"] | {"vocab": vocab | {"zebrafox": len(vocab)}}
    spec = byte_level("gpt-2", merged | {"model": model})
    assert "the piece 'zebrafox'" in refused(opened(spec, tmp_path))


def test_a_model_without_an_end_is_refused(merged: dict[str, Any], tmp_path: Path) -> None:
    source = opened(byte_level("gpt-2", merged), tmp_path)
    assert "no token ends" in refused(replace(source, eos_ids=()))
