"""onnxruntime-genai reads the tokenizer that is written for it: equal ids, or a refusal."""

# ruff: noqa: RUF001  (letters that look like others are the point)
from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import onnxruntime_genai as genai
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from slimport.architectures import decoder_config
from slimport.errors import BadInput, Unsupported, ValidationFailed
from slimport.export.container import Deployment
from slimport.export.onnx import tokenizer as container
from slimport.export.onnx.genai import files as files_of
from slimport.tokenizer import pretokenizers as known
from slimport.tokenizer.conformance import CHATS, TEXTS
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import conformance
from slimport.validation.runtimes import onnxruntime

SIZE = 1 << 14  # rows of an embedding
LETTERS = (
    *"aAbBéÉñяЯЖǅʰªːািกั你あا' s!_./½②٣€☃ßẞİıωΩﬁⅧⓐ1 23\n\t\r()|。、▁",
    *("ll", "\u0301", "\u200d", "\u00a0", "\u3000", "𝒜", "𐐀", "   ", "'re", "'S", "42", " the"),
    *(
        "\n\n",
        "\n    ",
        "    ",
        "\r\n",
        " fox",
        "Hello",
        "don't",
        "YOU'LL",
        "é",
        "한국",
        "🙂",
        "👩‍👧",
    ),
)
# Unicode 3.2 is the same in every Python; genai's tables are of Unicode 13.
CHARACTERS = [
    letter
    for letter in map(chr, range(1, sys.maxunicode))
    if unicodedata.ucd_3_2_0.category(letter) not in ("Cn", "Co", "Cs") and letter != "\u0085"
]
SPACES = [one for one in CHARACTERS if unicodedata.category(one)[0] in "ZC"]
CODE = (
    "def f(x):\n    if x:\n\n        return 1\n    \n    y = 2  \n      z = 3\n\t\n\n  \n   end\n"
)
BLANK = [CODE, "\n    \n    x", "a  \n  b", "1.  \n   2", "\n \n x", " \n x", "x \n  y"]
LONG = ["x" * 400, "你好世界" * 80, "ab1" * 100, "\n" * 200, "-" * 300, "the fox " * 300, " " * 900]
BYTE_NAMES = ["<0x0A>", "<0x0A> b", "a<0xE2>", "<0x41><0x42>", "</s><0x0A></s>", " <0x0A>"]


def texts(count: int, seed: int = 7) -> list[str]:
    """Nasty texts, then random ones: tangled words, letters of all scripts, odd spaces."""
    random = Random(seed)
    spaces = [*SPACES, *"a1. \n\n"]
    found = [*TEXTS, *BLANK, *LONG, *BYTE_NAMES]
    for _ in range(count):
        found.append("".join(random.choices(LETTERS, k=random.randint(2, 14))))
        found.append("".join(random.choices(CHARACTERS, k=random.randint(1, 9))))
        found.append("".join(random.choices(spaces, k=random.randint(2, 6))))
    return found


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre.Split(Regex(regex), behavior, invert)


def to_bytes(use_regex: bool = False) -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)


TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DIGITS = pre.Digits(individual_digits=True)
# structure -> ignore_merges, steps
BYTE_LEVEL: dict[str, tuple[bool, list[Any]]] = {
    "gpt-2": (False, [to_bytes(True)]),
    "gpt-2 as a split": (False, [split(known.GPT2, "removed", True), to_bytes()]),
    "starcoder": (False, [DIGITS, to_bytes(True)]),
    "llama 3": (True, [split(known.LLAMA3), to_bytes()]),
    "dbrx": (False, [split(known.LLAMA3, "removed", True), to_bytes()]),
    "cl100k": (False, [split(TIKTOKEN), to_bytes()]),
    "qwen2": (False, [split(known.QWEN2), to_bytes()]),
    "bailingmoe": (False, [split(TIKTOKEN.replace("{1,3}", "")), to_bytes()]),
    "seed-coder": (False, [split(known.SEED_CODER), to_bytes()]),
    "qwen3.5": (False, [split(known.QWEN35), to_bytes()]),
    "minicpm5": (True, [split(known.THREE_DIGITS), split(known.MINICPM5), to_bytes()]),
}
SENTENCEPIECE = ("space before a text", "no space before a text")


@pytest.fixture(scope="module")
def merged() -> dict[str, Any]:
    """8000 pieces trained across every split, on texts like those that are asked."""
    trained = Library(models.BPE())
    trained.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    given = [*texts(1000), *TEXTS * 4, *BLANK * 9, "你好世界" * 3]
    trained.train_from_iterator(
        given,
        BpeTrainer(
            vocab_size=8000,
            special_tokens=["</s>"],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained.decoder = decoders.ByteLevel()
    trained.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return dict(json.loads(trained.to_str()))


@pytest.fixture(scope="module")
def words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """SentencePiece's vocabulary: bytes, and 9000 pieces without a space after anything else."""
    trained = Library(models.BPE())
    trained.pre_tokenizer = pre.Metaspace(prepend_scheme="never")
    given = [*texts(1000), *TEXTS * 4, *BLANK * 9, *["你好世界" * 3, "a 1 12 x;\n\n"] * 9]
    given = [text for text in given if "<0x" not in text]
    trained.train_from_iterator(given, BpeTrainer(vocab_size=9000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece not in pieces]
    return {piece: i for i, piece in enumerate(pieces)}, [(a, b) for a, b in model["merges"]]


def written(steps: list[Any]) -> dict[str, Any]:
    library = Library(models.BPE())
    library.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    return dict(json.loads(library.to_str())["pre_tokenizer"])


def byte_level(structure: str, model: dict[str, Any]) -> dict[str, Any]:
    ignore_merges, steps = BYTE_LEVEL[structure]
    ignored = model["model"] | {"ignore_merges": ignore_merges}
    return model | {"pre_tokenizer": written(steps), "model": ignored}


def sentencepiece(
    vocab: dict[str, int], merges: list[tuple[str, str]], space: bool
) -> dict[str, Any]:
    library = Library(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    mark: Any = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space:
        mark = normalizers.Sequence([normalizers.Prepend("▁"), mark])
        steps.append(decoders.Strip(" ", 1, 0))
    library.normalizer, library.decoder = mark, decoders.Sequence(steps)
    special = [AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    library.add_special_tokens(special)
    return dict(json.loads(library.to_str()))


def opened(spec: dict[str, Any], folder: Path, pre: str | None = None) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer.open(folder, pre)


def in_genai(files: dict[str, bytes], folder: Path) -> Any:
    """genai's tokenizer; no model is needed for it."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = {"model": {"type": "decoder", "context_length": 8, "vocab_size": SIZE}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return genai.Tokenizer(str(folder))


def both(
    spec: dict[str, Any], folder: Path, given: list[str]
) -> list[tuple[str, list[int], list[int], list[int]]]:
    """Text; ids of the source, of the written file in the tokenizers library, and in genai."""
    source = opened(spec, folder / "source")
    container.refuse(source, SIZE)
    files = container.files(source)
    assert files == container.files(opened(spec, folder / "source"))
    again = Library.from_str(files["tokenizer.json"].decode())
    runtime = in_genai(files, folder / "written")
    return [
        (
            text,
            source.encode(text),
            again.encode(text, add_special_tokens=False).ids,
            [int(token) for token in runtime.encode(text)],
        )
        for text in given
    ]


@pytest.fixture(scope="module")
def make(merged: dict[str, Any], words: Any) -> Callable[[str], dict[str, Any]]:
    """make(structure) -> tokenizer.json."""

    def of(structure: str) -> dict[str, Any]:
        if structure in SENTENCEPIECE:
            return sentencepiece(*words, space=structure == SENTENCEPIECE[0])
        return byte_level(structure, merged)

    return of


def is_cut(text: str) -> bool:
    """Known to differ where a space comes before every text, see below."""
    long = re.search(r"[^ \n]{100}", text) is not None
    return text.startswith(" ") and (long or "\r" in text or "\n" in text)


@pytest.mark.parametrize("structure", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_ids_are_those_of_the_source(
    structure: str, make: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    marks = [f"a{t}b {t} {t}{t}\n{t}" for t in ("</s>", "<tool_call>", "<tool", "</s")]
    given = [*texts(600, seed=99), *marks]
    assert len(given) > 1900
    for text, own, again, got in both(make(structure), tmp_path, given):
        assert own == again, ascii(text)
        if structure != SENTENCEPIECE[0] or not is_cut(text):
            assert own == got, ascii(text)


AS_IT_IS = ["starcoder", "llama 3", "qwen2", "qwen3.5", *SENTENCEPIECE]


@pytest.mark.parametrize("structure", AS_IT_IS)
def test_the_file_as_it_is_has_other_ids(
    structure: str, make: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    source = opened(make(structure), tmp_path)
    files = container.files(source)
    files["tokenizer.json"] = (tmp_path / "tokenizer.json").read_bytes()
    runtime, given = in_genai(files, tmp_path), [*BLANK, *TEXTS, *LONG]
    assert any(source.encode(text) != list(runtime.encode(text)) for text in given)


def tiny(
    merges: list[tuple[str, str]],
    more: list[str],
    structure: str = "gpt-2",
    added: tuple[str, ...] = (),
) -> dict[str, Any]:
    pieces = ["</s>", *sorted(pre.ByteLevel.alphabet()), *map("".join, merges), *more]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    library.add_tokens([AddedToken(text, normalized=False) for text in added])
    return byte_level(structure, json.loads(library.to_str()))


def tiny_words(merges: list[tuple[str, str]], more: str = "", space: bool = False) -> Any:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*dict.fromkeys([*"▁ab<0x", *more, *map("".join, merges)])]
    return sentencepiece({piece: i for i, piece in enumerate(pieces)}, merges, space)


@pytest.mark.parametrize(
    ("structure", "text", "merges"),
    [
        ("gpt-2", "\x85\u2005", [("Â", "ħ"), ("Âħ", "â"), ("Âħâ", "Ģ"), ("ÂħâĢ", "ħ")]),
        ("gpt-2", "a\u0870", [("a", "à"), ("aà", "¡")]),  # a letter since Unicode 14
        ("llama 3", "'\u017fx", [("Å", "¿"), ("Å¿", "x")]),  # a long s, taken for 's
        ("gpt-2", "a\0b", [("a", "b")]),  # the end of a text in C
    ],
)
def test_what_is_known_to_differ(
    structure: str, text: str, merges: list[tuple[str, str]], tmp_path: Path
) -> None:
    """docs/tokenizers.md tells of these; the test fails once genai does the same."""
    ((_, own, again, got),) = both(tiny(merges, [], structure), tmp_path, [text])
    assert own == again
    assert own != got


def test_normalization_is_known_to_be_left_to_the_app(
    make: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    spec = make("qwen2") | {"normalizer": {"type": "NFC"}}
    decomposed, composed = both(spec, tmp_path, ["e\u0301", "\u00e9"])
    assert decomposed[1] == composed[1] == composed[3]
    assert decomposed[1] != decomposed[3]


def test_a_space_before_a_long_word_is_known_to_differ(tmp_path: Path) -> None:
    """After a space of its own, text with another space before it is cut after 100 letters."""
    long = "ab" * 60
    given = [" " + long, "</s> " + long, long, " " + "ab " * 60, " " + long[:80]]
    found = both(tiny_words([("a", "b")], space=True), tmp_path, given)
    assert [own == got for _, own, _, got in found] == [False, False, True, True, True]
    assert all(own == again for _, own, again, _ in found)


# ---- refusals ----


def refused(spec: dict[str, Any], folder: Path, vocab_size: int = SIZE, **how: Any) -> str:
    with pytest.raises(Unsupported) as error:
        container.refuse(opened(spec, folder, **how), vocab_size)
    assert len(str(error.value).splitlines()) == 3
    return str(error.value)


@pytest.mark.parametrize(
    "steps",
    [
        [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ\u30a0-ヿ]+"), to_bytes()],
        [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), to_bytes()],
        [split(r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|\s+"), to_bytes()],
        [pre.Punctuation("contiguous"), to_bytes(True)],
        [to_bytes()],
    ],
    ids=["deepseek", "bloom", "cases", "punctuation", "nothing"],
)
def test_other_splits_are_refused_and_no_name_helps(steps: list[Any], tmp_path: Path) -> None:
    spec = tiny([("q", "x")], []) | {"pre_tokenizer": written(steps)}
    words = refused(spec, tmp_path, pre="gpt-2")
    assert words.startswith("the tokenizer splits text with")
    assert words.endswith("--container gguf")


def test_characters_without_bytes_are_refused(tmp_path: Path) -> None:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *"▁abc"])}
    library = Library(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    assert "no tokens for bytes" in refused(json.loads(library.to_str()), tmp_path)


def test_a_piece_that_no_merge_makes_is_refused(tmp_path: Path) -> None:
    assert "the piece 'fox'" in refused(tiny([("f", "o")], ["fox"]), tmp_path)
    source = opened(tiny([("f", "o")], ["fox"], "llama 3"), tmp_path)
    container.refuse(source, SIZE)  # ignore_merges: it is always taken


def test_pieces_over_two_words_are_refused(tmp_path: Path) -> None:
    spec = tiny_words([("a", "▁")])
    assert "'a▁' has a space after something else" in refused(spec, tmp_path)
    container.refuse(opened(tiny_words([("▁", "▁"), ("▁▁", "a")]), tmp_path), SIZE)


def test_names_of_bytes_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    merges = [("<", "0"), ("<0", "x")]
    joined = [("<0x", digit) for digit in "0123456789ABCDEF"]
    digits = "0123456789ABCDEF>"
    assert "'<0x'" in refused(tiny_words([*merges, *joined], digits), tmp_path)
    for space, known_merges in ((False, merges), (True, [*merges, *joined])):
        spec = tiny_words(known_merges, digits, space)
        for _, own, again, got in both(spec, tmp_path, BYTE_NAMES):
            assert own == again == got


@pytest.mark.parametrize(
    ("added", "why"),
    [
        (("<abcd>", "bc"), "'bc' stands within '<abcd>'"),
        (("x" * 1001,), "has 1001 letters"),
    ],
)
def test_added_tokens_that_genai_loses_are_refused(
    added: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    assert why in refused(tiny([("q", "x")], [], added=added), tmp_path)


def test_added_tokens_that_genai_finds(tmp_path: Path) -> None:
    added = ("|||A|||", "|||LONG|||", "<a", "<ab>", "  ", "   ", "    ")
    given = ["|||A|||LONG|||", "<ab<ab><a>", "a  b     c ", *(f"{t}x{t}\n{t}" for t in added)]
    for text, own, again, got in both(tiny([("q", "x")], [], added=added), tmp_path, given):
        assert own == again == got, text


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = opened(tiny([("q", "x")], []), tmp_path)
    with pytest.raises(Unsupported, match="no token ends"):
        container.refuse(replace(tokenizer, eos_ids=()), SIZE)


def test_ids_beyond_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="embedding has 100 rows"):
        container.refuse(opened(tiny([("q", "x")], []), tmp_path), 100)


# ---- tokenizer_config.json ----


def test_settings_are_our_own(make_model: Callable[..., Path], tmp_path: Path) -> None:
    files = container.files(Tokenizer.open(make_model("llama")))
    settings = json.loads(files["tokenizer_config.json"])
    assert settings.pop("chat_template").startswith("{{ bos_token }}")
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
    }
    runtime = in_genai(files, tmp_path)
    runtime.update_options(add_special_tokens="true")
    assert not len(runtime.encode(""))  # a rendered chat brings its own BOS, and no second one


# ---- judged in genai ----


def exported(model: Path, folder: Path) -> tuple[Tokenizer, Path]:
    """A model's tokenizer, and a folder with all but the graph."""
    tokenizer = Tokenizer.open(model)
    config = decoder_config(json.loads((model / "config.json").read_text()))
    container.refuse(tokenizer, config.vocab_size)
    for name, content in {
        "model.onnx": b"",
        **files_of(config, tokenizer, Deployment(64)),
    }.items():
        (folder / name).write_bytes(content)
    return tokenizer, folder / "model.onnx"


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen2", "spm", "gemma"])
def test_tokenizers_conform(make_model: Callable[..., Path], style: str, tmp_path: Path) -> None:
    tokenizer, file = exported(make_model("llama", tokenizer=style), tmp_path)
    found = conformance.check(tokenizer, file, onnxruntime)
    assert found.conforms and found.checked >= 60 and found.chats == len(CHATS)
    read = onnxruntime.vocabulary(file)
    assert (read.size, read.eog, read.adds_bos) == (416, tokenizer.eos_ids, None)


def test_another_template_in_the_files_does_not_conform(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer, file = exported(make_model("llama"), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{{ 'one more' }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValidationFailed, match="renders a conversation as"):
        conformance.check(tokenizer, file, onnxruntime)
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert conformance.check(tokenizer, file, onnxruntime).chats == 0
