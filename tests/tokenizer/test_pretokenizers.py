"""Every pre-tokenizer that is known splits as llama.cpp does; the others are refused by name."""

# ruff: noqa: RUF001  (letters that look like others are the point)
from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from slimport.errors import Unsupported
from slimport.export.gguf.vocabulary import vocabulary_metadata
from slimport.tokenizer import tokenizer as ours
from slimport.tokenizer.pretokenizers import pre_name
from slimport.validation.runtimes import llamacpp

LETTERS = (
    *"aAbBéÉñяЯЖǅʰªːािกั你あا' s!_./½②٣€☃ßẞİıωΩﬁⅧⓐ1 23\n\t\r()|。、",
    *("ll", "\u0301", "\u200d", "\u00a0", "\u3000", "\u0085", "𝒜", "𐐀", "   ", "'re", "'S", "42"),
)
# Unicode 3.2 is the same in every Python; llama.cpp's tables are of Unicode 15.
CHARACTERS = [
    letter
    for letter in map(chr, range(1, sys.maxunicode))
    if unicodedata.ucd_3_2_0.category(letter) not in ("Cn", "Co", "Cs")
]


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre.Split(Regex(regex), behavior, invert)


def bytes_(use_regex: bool = False) -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)


DIGITS = pre.Digits(individual_digits=True)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (  # with line ends themselves in the regex, as DeepSeek writes it
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
JAIS2 = LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + (
    r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)"
    r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
# structure -> llama.cpp's name, ignore_merges, steps
KNOWN: dict[str, tuple[str, bool, list[Any]]] = {
    "gpt-2": ("gpt-2", False, [bytes_(True)]),
    "gpt-2 as a split": ("gpt-2", False, [split(GPT2, "removed", True), bytes_()]),
    "starcoder": ("smollm", False, [DIGITS, bytes_(True)]),
    "llama 3": ("llama-bpe", True, [split(LLAMA3), bytes_()]),
    "dbrx": ("smaug-bpe", False, [split(LLAMA3, "removed", True), bytes_()]),
    "cl100k": ("smaug-bpe", False, [split(CL100K), bytes_()]),
    "qwen2": ("qwen2", False, [split(QWEN2), bytes_()]),
    "bailingmoe": ("qwen2", False, [split(CL100K.replace("{1,3}", "")), bytes_()]),
    "deepseek-v3": ("deepseek-v3", False, [*map(split, DEEPSEEK_V3), bytes_()]),
    "bloom": ("bloom", False, [split(BLOOM), bytes_()]),
    "viking": ("viking", False, [split(BLOOM), DIGITS, bytes_()]),
    "seed-coder": ("seed-coder", False, [split(SEED_CODER), bytes_()]),
    "jais-2": ("jais-2", False, [split(JAIS2), bytes_()]),
    "qwen3.5": ("qwen35", False, [split(QWEN35), bytes_()]),
    "exaone-moe": ("exaone-moe", False, [split(EXAONE_MOE), bytes_()]),
    "minicpm5": (
        "minicpm5",
        True,
        [split(r"\p{N}{1,3}"), split(LLAMA3.replace("{1,3}", "+")), bytes_()],
    ),
}


def written(steps: list[Any]) -> dict[str, Any]:
    """As it stands in tokenizer.json."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    return dict(json.loads(library.to_str())["pre_tokenizer"])


@pytest.mark.parametrize("structure", KNOWN)
def test_the_name_comes_from_the_structure(structure: str) -> None:
    name, ignore_merges, steps = KNOWN[structure]
    assert pre_name(written(steps), ignore_merges) == name


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([split(TEKKEN), bytes_()], "tekken knows upper and lower case only from a to z"),
        ([split(O200K), bytes_()], "gpt-4o knows upper and lower case only from a to z"),
        (
            [split("[\r\n]"), split("[一-龥ࠀ-一가-\ud7ff]+"), DIGITS, bytes_()],
            "deepseek-coder does not keep wide spaces",
        ),
        ([split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), bytes_()], "superbpe knows no digits"),
        ([pre.Punctuation("contiguous"), bytes_(True)], "Punctuation"),
        ([bytes_(True), pre.Digits(individual_digits=False), bytes_()], "ByteLevel"),
        ([pre.Digits(individual_digits=False), bytes_(True)], "Digits"),
        ([split(LLAMA3, "removed"), bytes_()], "Removed"),
        ([split(r"\p{N}{1,3}", "removed", True), bytes_()], "Removed"),
        ([split(LLAMA3, "merged_with_next"), bytes_()], "MergedWithNext"),
        ([split(r"\w+"), bytes_()], "unknown here"),
    ],
)
def test_what_llama_cpp_splits_otherwise(steps: list[Any], why: str) -> None:
    with pytest.raises(Unsupported, match=why) as error:
        pre_name(written(steps), False)
    assert len(str(error.value).splitlines()) == 3


def texts(count: int) -> list[str]:
    """Tangled letters that tell regexes apart, and characters of all scripts."""
    random = Random(1)
    found = ["".join(random.choices(LETTERS, k=random.randint(2, 14))) for _ in range(count)]
    return found + ["".join(random.choices(CHARACTERS, k=random.randint(1, 9))) for _ in found]


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    """2000 pieces trained across every split, so that each one matters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts(2000),
        BpeTrainer(
            vocab_size=2000,
            special_tokens=["</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return dict(json.loads(trained.to_str()))


def both(
    structure: str, model: dict[str, Any], folder: Path, given: list[str], name: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """Ids by the tokenizers library and by llama.cpp, from a file that is a vocabulary only."""
    _, ignore_merges, steps = KNOWN[structure]
    settings = {"ignore_merges": ignore_merges}
    spec = model | {"pre_tokenizer": written(steps), "model": model["model"] | settings}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = ours.Tokenizer.open(folder, pre=name)
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    for key, value in vocabulary_metadata(tokenizer, len(tokenizer.pieces())).items():
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, np.asarray(value).tolist())
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            kinds[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    got = llamacpp.tokenize(folder / "vocabulary.gguf", given)
    return [(tokenizer.encode(text), ids) for text, ids in zip(given, got, strict=True)]


def tangled() -> list[str]:
    given = texts(250)
    return ["\n".join(given[i : i + 5]) for i in range(0, len(given), 5)]


@pytest.mark.parametrize("structure", KNOWN)
def test_tangled_text_has_equal_ids(structure: str, model: dict[str, Any], tmp_path: Path) -> None:
    given = tangled()
    for text, (own, got) in zip(given, both(structure, model, tmp_path, given), strict=True):
        assert own == got, ascii(text)


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        ("bloom", "gpt-2"),
        ("viking", "bloom"),
        ("seed-coder", "qwen2"),
        ("jais-2", "smaug-bpe"),
        ("qwen3.5", "qwen2"),
        ("exaone-moe", "qwen2"),
        ("minicpm5", "llama-bpe"),
        ("bailingmoe", "seed-coder"),
    ],
)
def test_the_nearest_name_has_other_ids(
    structure: str, name: str, model: dict[str, Any], tmp_path: Path
) -> None:
    pairs = both(structure, model, tmp_path, tangled(), name)
    assert any(own != got for own, got in pairs)


def tiny(merges: list[tuple[str, str]], more: list[str]) -> dict[str, Any]:
    pieces = ["</s>", *sorted(pre.ByteLevel.alphabet()), *map("".join, merges), *more]
    library = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    library.add_special_tokens(["</s>"])
    return dict(json.loads(library.to_str()))


@pytest.mark.parametrize("structure", ["llama 3", "dbrx", "qwen3.5", "minicpm5"])
def test_a_piece_that_no_merge_makes(structure: str, tmp_path: Path) -> None:
    ((own, got),) = both(structure, tiny([("q", "x")], ["fox"]), tmp_path, ["fox"])
    assert own == got
    assert len(own) == (1 if KNOWN[structure][1] else 3)


@pytest.mark.parametrize(
    ("structure", "text", "merges"),
    [
        ("llama 3", "'\u017fx", [("Å", "¿"), ("Å¿", "x")]),  # a long s, taken for 's
        ("gpt-2", "a\u1c89", [("a", "á")]),  # a letter since Unicode 16
    ],
)
def test_what_is_known_to_differ(
    structure: str, text: str, merges: list[tuple[str, str]], tmp_path: Path
) -> None:
    """docs/tokenizers.md tells of these; the test fails once llama.cpp does the same."""
    ((own, got),) = both(structure, tiny(merges, []), tmp_path, [text])
    assert own != got


def test_added_tokens_that_overlap_are_known_to_differ(tmp_path: Path) -> None:
    """The tokenizers library takes the first from the left, llama.cpp the longest of the text."""
    spec = tiny([("q", "x")], [])
    (end,), free = spec["added_tokens"], len(spec["model"]["vocab"])
    for index, text in enumerate(("|||A|||", "|||LONG|||"), start=free):
        spec["added_tokens"].append(end | {"id": index, "content": text})
    alone, joined = both("gpt-2", spec, tmp_path, ["|||A||| |||LONG|||", "|||A|||LONG|||"])
    assert alone[0] == alone[1]
    assert joined[0] != joined[1]
