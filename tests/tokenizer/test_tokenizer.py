"""The scheme is read from tokenizer.json's structure; ids, pieces and chat prompts are right.

That llama.cpp gives equal ids is tested where it runs (tests/validation); here stands that what it
would do in another way is refused.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import struct
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from slimport.errors import BadInput, SlimportError, Unsupported
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.tokenizer.vocabulary import Piece, read_pieces, read_scheme, space_charsmap

Edit = Callable[[dict[str, Any]], object]
MODELS = Path(__file__).parents[1] / "../shared/models"


@pytest.fixture
def folder(make_model: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    style = getattr(request, "param", "gpt2")
    return Path(shutil.copytree(make_model("llama", tokenizer=style), tmp_path / "model"))


spm = pytest.mark.parametrize("folder", ["spm"], indirect=True)
qwen2 = pytest.mark.parametrize("folder", ["qwen2"], indirect=True)


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edited(folder: Path, edit: Edit) -> Tokenizer:
    edit_json(folder / "tokenizer.json", edit)
    return Tokenizer.open(folder)


@pytest.mark.parametrize(
    ("style", "kind", "pre", "adds_bos"),
    [
        ("gpt2", "bpe", "gpt-2", True),
        ("llama3", "bpe", "llama-bpe", True),
        ("qwen2", "bpe", "qwen2", False),
        ("deepseek-v3", "bpe", "deepseek-v3", True),
        ("spm", "spm", None, True),
        ("gemma", "spm", None, True),
    ],
)
def test_the_scheme_comes_from_the_structure(
    make_model: Any, style: str, kind: str, pre: str | None, adds_bos: bool
) -> None:
    tokenizer = Tokenizer.open(make_model("llama", tokenizer=style))
    assert (tokenizer.kind, tokenizer.pre, tokenizer.adds_bos) == (kind, pre, adds_bos)
    assert tokenizer.scheme.nfc == (style == "qwen2")
    assert tokenizer.scheme.space_prefix == (style == "spm")
    plain = tokenizer.encode("The fox")
    assert tokenizer.encode("The fox", add_special=True) == [tokenizer.bos_id] * adds_bos + plain
    assert (
        tokenizer.decode(tokenizer.encode("The fox is 12.", add_special=True)) == "The fox is 12."
    )


def digits_first(spec: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, spec["pre_tokenizer"]],
    }


def test_other_pre_tokenizers_of_llama_cpp(folder: Path, make_model: Any, tmp_path: Path) -> None:
    assert edited(folder, digits_first).pre == "smollm"
    llama3 = shutil.copytree(make_model("llama", tokenizer="llama3"), tmp_path / "llama3")
    assert edited(llama3, lambda s: s["model"].update(ignore_merges=False)).pre == "smaug-bpe"


def test_an_unknown_regex_is_named_and_can_be_overridden(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split, level | {"use_regex": False}]
    with pytest.raises(Unsupported, match=r"\\w\+.*\n.*\n.*--pre NAME") as error:
        edited(
            folder, lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        )
    assert error.value.exit_code == 5
    assert Tokenizer.open(folder, pre="mine").pre == "mine"


def test_tekken_is_refused_because_llama_cpp_parts_some_letters_otherwise(make_model: Any) -> None:
    with pytest.raises(Unsupported, match=r"llama\.cpp's tekken"):
        Tokenizer.open(make_model("llama", tokenizer="tekken"))


def test_the_name_of_the_model_decides_nothing(folder: Path) -> None:
    named = folder.parent / "Qwen2-Llama-3-phi3"
    folder.rename(named)
    edit_json(named / "config.json", lambda c: c.update(_name_or_path="Qwen/Qwen2.5-0.5B"))
    edit_json(named / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer"))
    assert Tokenizer.open(named).pre == "gpt-2"


def add_token(**flags: object) -> Edit:
    def edit(spec: dict[str, Any]) -> None:
        spec["added_tokens"][-1] |= flags

    return edit


def drop_piece(text: str) -> Edit:
    def edit(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"].pop(text)
        spec["model"]["merges"] = [m for m in spec["model"]["merges"] if text not in "".join(m)]

    return edit


def prefix_space(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["add_prefix_space"] = True


def ends_with_eos(spec: dict[str, Any]) -> None:
    single = spec["post_processor"]["single"]
    single.append(single[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["model"].update(dropout=0.1), "dropout = 0.1"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: s["model"].update(ignore_merges=True), "unknown here"),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "NFKC"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "normalizes text with nothing"),
        (prefix_space, "add_prefix_space"),
        (add_token(rstrip=True), "is rstrip"),
        (add_token(single_word=True), "is single_word"),
        (drop_piece("z"), "1 bytes have no token, such as 0x7A"),
        (ends_with_eos, "adds special tokens around"),
        (
            lambda s: s.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "WordLevel",
        ),
    ],
)
def test_byte_level_schemes_that_llama_cpp_has_not(folder: Path, edit: Edit, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as error:
        edited(folder, edit)
    assert error.value.exit_code == 5
    assert len(str(error.value).splitlines()) == 3


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@spm
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(normalizer=None), "normalizes text with nothing"),
        (lambda s: s.update(pre_tokenizer=METASPACE), "Metaspace"),
        (lambda s: s["model"].update(byte_fallback=False), "256 of 256 byte tokens"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        (drop_piece("<0xE2>"), "255 of 256 byte tokens"),
        (add_token(normalized=True), "is normalized"),
    ],
)
def test_sentencepiece_schemes_that_llama_cpp_has_not(
    folder: Path, edit: Edit, message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        edited(folder, edit)


def merge_by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """As llama.cpp: join the neighbours whose piece has the best score, the leftmost first."""
    state = list(text)
    while True:
        pairs = enumerate(itertools.pairwise(state))
        due = [(-scores[left + right], i) for i, (left, right) in pairs if left + right in scores]
        if not due:
            return state
        _, place = min(due)
        state[place : place + 2] = [state[place] + state[place + 1]]


def random_merges(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """A small vocabulary; merges as trained, as converted from SentencePiece, or in disorder."""
    vocab = list("abc"[: rng.randint(1, 3)])
    merges: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 7)):
        pair = rng.choice(vocab), rng.choice(vocab)
        if len("".join(pair)) < 6 and pair not in merges:
            merges.append(pair)
            vocab = list(dict.fromkeys([*vocab, "".join(pair)]))
    pieces = [piece for piece in vocab if len(piece) > 1]
    how = rng.choice(["trained", "converted", "disorder"])
    if how == "converted":
        cuts = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
        merges = [pair for pair in cuts if set(pair) <= set(vocab)]
    elif how == "disorder":
        rng.shuffle(merges)
    return vocab, merges


def sentencepiece_spec(vocab: list[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    every = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocab]
    ids = {piece: index for index, piece in enumerate(every)}
    model = tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    return dict(json.loads(library.to_str()))


def test_merging_by_score_equals_merging_by_rank_wherever_it_is_accepted() -> None:
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(800):
        vocab, merges = random_merges(rng)
        spec = sentencepiece_spec(vocab, merges)
        texts = ["".join(rng.choices("abc", k=rng.randint(2, 12))) for _ in range(20)]
        try:
            pieces = read_pieces(spec, read_scheme(spec))
        except Unsupported:
            refused += 1
            continue
        accepted += 1
        scores = {piece.text: piece.score for piece in pieces if len(piece.text) > 1}
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        for text in texts:
            known = "".join(letter for letter in text if letter in vocab)
            assert library.encode(known).tokens == merge_by_score(known, scores), merges
    assert min(accepted, refused) > 100


def test_a_pair_that_only_llama_cpp_would_merge_is_refused() -> None:
    vocab = ["a", "b", "c", "ab", "bc", "abc"]
    spec = sentencepiece_spec(vocab, [("a", "b"), ("b", "c"), ("a", "bc")])
    with pytest.raises(Unsupported, match="does not merge 'ab' and 'c' into 'abc'"):
        read_scheme(spec)
    scattered = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a"), ("a", "bc")]
    with pytest.raises(Unsupported, match="the merges into 'abc' do not stand together"):
        read_scheme(sentencepiece_spec([*vocab, "ca"], scattered))
    # With bc first, ab never stands before c.
    read_scheme(sentencepiece_spec(vocab, [("b", "c"), ("a", "bc"), ("a", "b")]))


def test_pieces_in_the_order_of_ids_with_padding(tiny_qwen2: Path) -> None:
    tokenizer = Tokenizer.open(tiny_qwen2)
    pieces = tokenizer.pieces(416)
    assert len(pieces) == 416
    assert len(tokenizer.pieces()) == 400
    assert pieces[:3] == [Piece(text, "control", 0.0) for text in ("<|bos|>", "<|eos|>", "<|pad|>")]
    assert (pieces[399].text, pieces[399].kind) == ("<tool_call>", "user_defined")
    assert [piece.kind for piece in pieces[5:399]] == ["normal"] * 394
    assert [(p.text, p.kind) for p in pieces[400:]] == [
        (f"[PAD{index}]", "unused") for index in range(400, 416)
    ]
    assert [piece.text for piece in pieces[:400]] == [
        tokenizer.library.id_to_token(index) for index in range(400)
    ]
    written = json.loads((tiny_qwen2 / "tokenizer.json").read_text())["model"]["merges"]
    assert tokenizer.merges() == [" ".join(pair) for pair in written]
    with pytest.raises(BadInput, match=r"has the id 399 .'<tool_call>'.\n.*399 rows"):
        tokenizer.pieces(399)


def test_scores_of_sentencepiece_pieces_are_their_order_of_merging(make_model: Any) -> None:
    tokenizer = Tokenizer.open(make_model("llama", tokenizer="spm"))
    pieces = tokenizer.pieces()
    kinds = [piece.kind for piece in pieces]
    assert kinds[:3] == ["unknown", "control", "control"]
    assert kinds[3:259] == ["byte"] * 256
    merged = [piece for piece in pieces[259:] if piece.kind == "normal" and len(piece.text) > 1]
    assert [piece.score for piece in merged] == [-float(i) for i in range(len(merged))]
    single = {piece.score for piece in pieces[259:] if len(piece.text) == 1}
    assert single == {-float(len(merged))}


def test_holes_between_ids_are_unused_pieces(folder: Path) -> None:
    def move_last(spec: dict[str, Any]) -> None:
        vocab = spec["model"]["vocab"]
        vocab[max(vocab, key=vocab.__getitem__)] = 405

    pieces = edited(folder, move_last).pieces()
    assert len(pieces) == 406
    assert (pieces[401].text, pieces[401].kind) == ("[PAD401]", "unused")
    assert pieces[405].kind == "normal"


def read_charsmap(charsmap: bytes, letter: int) -> bytes | None:
    """The replacement of one character, as SentencePiece's double array is walked."""
    (size,) = struct.unpack_from("<I", charsmap)
    cells = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    base = [(cell >> 10) << ((cell & 1 << 9) >> 6) for cell in cells]
    node = base[0] ^ letter
    if cells[node] & (1 << 31 | 0xFF) != letter or not cells[node] >> 8 & 1:
        return None
    start = 4 + size + (cells[node ^ base[node]] & 0x7FFFFFFF)
    return charsmap[start : charsmap.index(b"\0", start)]


def test_the_charsmap_replaces_a_space_and_nothing_else() -> None:
    found = {letter: read_charsmap(space_charsmap(), letter) for letter in range(1, 256)}
    assert found.pop(ord(" ")) == "▁".encode()
    assert set(found.values()) == {None}


@pytest.mark.skipif(not MODELS.exists(), reason="the shared models are not here")
def test_a_vocabulary_of_single_characters_without_byte_fallback() -> None:
    tokenizer = Tokenizer.open(MODELS / "stories_char105")
    assert (tokenizer.kind, tokenizer.unk_id, tokenizer.eos_ids) == ("ugm", 0, (2, 1))
    assert tokenizer.charsmap == space_charsmap()
    assert tokenizer.encode("\n\n") == [3, 0]
    byte_fallback = Tokenizer.open(MODELS / "stories260K")
    assert (byte_fallback.kind, byte_fallback.charsmap) == ("spm", None)
    assert Tokenizer.open(MODELS / "manpages-3.7M").adds_bos is False


@pytest.mark.skipif(not MODELS.exists(), reason="the shared models are not here")
def test_leading_spaces_survive_as_in_tokenizer_json() -> None:
    # AutoTokenizer gives one space piece less here.
    tokenizer = Tokenizer.open(MODELS / "stories260K")
    tokens = tokenizer.library.encode(" Once", add_special_tokens=False).tokens
    assert tokens[0] == "▁"
    assert "".join(tokens) == "▁▁Once"


def test_special_ids_and_the_order_of_eos_ids(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 2, None)
    assert tokenizer.eos_ids == (1, 4)  # the eos token first, then those of generation_config
    settings = folder / "tokenizer_config.json"
    edit_json(settings, lambda c: c.update(eot_token={"content": "<|im_start|>"}))
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=5))
    assert Tokenizer.open(folder).eos_ids == (1, 4, 5, 3)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        (folder / name).unlink()
    bare = Tokenizer.open(folder)
    assert (bare.bos_id, bare.eos_ids, bare.pad_id) == (0, (), None)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("generation_config.json", {"eos_token_id": 4711}, "eos_token_id = 4711 is no id"),
        ("generation_config.json", {"eos_token_id": ["a"]}, "eos_token_id = 'a' is no id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id = True is no id"),
        ("config.json", {"pad_token_id": -7}, "pad_token_id = -7 is no id"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "eos_token '</s>' is not in"),
    ],
)
def test_special_tokens_that_do_not_exist(
    folder: Path, file: str, values: dict[str, Any], message: str
) -> None:
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    edit_json(folder / file, lambda c: c.update(values))
    with pytest.raises(BadInput, match=message) as error:
        Tokenizer.open(folder)
    assert error.value.exit_code == 7


def test_minus_one_and_null_mean_no_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    edit_json(folder / "generation_config.json", lambda c: c.update(pad_token_id=-1))
    edit_json(folder / "config.json", lambda c: c.update(pad_token_id=None))
    assert Tokenizer.open(folder).pad_id is None


def test_truncation_and_padding_of_tokenizer_json_do_not_change_ids(folder: Path) -> None:
    expected = Tokenizer.open(folder).encode("a fox " * 30)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(5)
    library.enable_padding(length=300)
    library.save(str(folder / "tokenizer.json"))
    assert Tokenizer.open(folder).encode("a fox " * 30) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json is missing"),
        (b"{", "cannot be read"),
        (b'{"model": {}}', "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_read(
    folder: Path, content: bytes | None, message: str
) -> None:
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        Tokenizer.open(folder)


MESSAGES = [{"role": "user", "content": " Hi! "}]
PROMPT = "<|bos|><|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"


def test_the_chat_prompt(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.render_chat(MESSAGES) == PROMPT
    without = tokenizer.render_chat(MESSAGES, add_generation_prompt=False)
    assert without == PROMPT.removesuffix("<|im_start|>assistant\n")
    assert tokenizer.encode(PROMPT)[:2] == [0, 3]


def test_chat_templates_of_tokenizer_config(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = folder / "tokenizer_config.json"
    assert Tokenizer.open(folder).render_chat(MESSAGES) is None
    edit_json(settings, lambda c: c.update(chat_template=template))
    assert Tokenizer.open(folder).render_chat(MESSAGES) == PROMPT
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    edit_json(settings, lambda c: c.update(chat_template=named))
    assert Tokenizer.open(folder).render_chat(MESSAGES) == PROMPT
    edit_json(settings, lambda c: c.update(chat_template=named[:1]))
    assert Tokenizer.open(folder).chat_template is None
    edit_json(settings, lambda c: c.update(chat_template=7))
    with pytest.raises(BadInput, match="chat_template is 7"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ raise_exception('only one turn') }}",
        "{{ 1 // 0 }}",
        "{{ messages | tojson(7, 8, 9, 10, 11, 12) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_chat_templates_that_fail_or_break_out(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match="chat template cannot be rendered") as error:
        Tokenizer.open(folder).render_chat(MESSAGES)
    assert error.value.exit_code == 7


@pytest.mark.parametrize("style", ["gpt2", "qwen2", "spm"])
def test_conformance_texts(make_model: Any, style: str) -> None:
    tokenizer = Tokenizer.open(make_model("llama", tokenizer=style))
    texts = tokenizer.conformance_texts()
    assert len(texts) >= 60
    assert len(texts) == len(set(texts))
    assert {"", "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"} <= set(texts)
    assert any("<|im_start|>assistant\nIt's 408. 🙂<|im_end|>" in text for text in texts)
    composed = {unicodedata.normalize("NFC", text) for text in texts}
    assert (composed == set(texts)) == (style == "qwen2")
    assert not any("\0" in text for text in texts)


@qwen2
def test_a_template_that_refuses_a_system_message_still_has_a_prompt(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path.write_text(refusal + path.read_text())
    prompts = [t for t in Tokenizer.open(folder).conformance_texts() if "Danke" in t]
    assert len(prompts) == 1
    path.write_text("{{ raise_exception('never') }}")
    with pytest.raises(SlimportError, match="never"):
        Tokenizer.open(folder).conformance_texts()


def test_the_files_that_ship(folder: Path) -> None:
    (folder / "vocab.json").write_text("{}")
    assert [path.name for path in Tokenizer.open(folder).files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ]
