"""tokenizer.model alone gives the ids of SentencePiece, of tokenizer.json, and of llama.cpp."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport.errors import BadInput, SlimportError, Unsupported
from slimport.tokenizer.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
IDS = json.loads((DATA / "sentencepiece_ids.json").read_text())  # by sentencepiece 0.2.3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Model = dict[str, Any]


def message(*fields: tuple[int, int | float | bytes | str]) -> bytes:
    """Protocol buffers: (number of the field, value)."""
    found = b""
    for number, value in fields:
        if isinstance(value, float):
            found += bytes([number << 3 | 5]) + struct.pack("<f", value)
        elif isinstance(value, int):
            found += varint(number << 3) + varint(value % 2**64)
        else:
            raw = value.encode() if isinstance(value, str) else value
            found += varint(number << 3 | 2) + varint(len(raw)) + raw
    return found


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def model_of(spec: dict[str, Any]) -> Model:
    """What tokenizer.model would hold, from a tokenizer.json of the test models."""
    vocab = spec["model"]["vocab"]
    order = {
        "".join(pair): -float(i) for i, pair in reversed([*enumerate(spec["model"]["merges"])])
    }
    kinds = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {"<unk>": UNKNOWN}
    kinds |= dict.fromkeys(("<|bos|>", "<|eos|>"), CONTROL)
    pieces = [[text, order.get(text, -1e6), kinds.get(text, NORMAL)] for text in vocab]
    space_first = spec["normalizer"]["type"] == "Sequence"
    return {
        "pieces": pieces,
        "trainer": {3: 2, 35: 1, 41: 1, 42: 2, 43: -1},
        "normalizer": {1: "identity", 3: int(space_first), 4: 0},
    }


def written(model: Model) -> bytes:
    pieces = [message((1, text), (2, score), (3, kind)) for text, score, kind in model["pieces"]]
    parts = [(2, message(*model["trainer"].items())), (3, message(*model["normalizer"].items()))]
    return message(*((1, piece) for piece in pieces), *parts)


@pytest.fixture
def folder(make_model: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model whose tokenizer.json became a tokenizer.model."""
    style = getattr(request, "param", "spm")
    target = Path(shutil.copytree(make_model("llama", tokenizer=style), tmp_path / "model"))
    spec = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").unlink()
    (target / "tokenizer.model").write_bytes(written(model_of(spec)))
    tokens = [t for t in spec["added_tokens"] if t["id"] >= len(spec["model"]["vocab"])]
    edit_settings(target, added_tokens_decoder={str(token["id"]): token for token in tokens})
    return target


def edit_settings(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edited(folder: Path, edit: Callable[[Model], object]) -> Tokenizer:
    library = Tokenizer.open(folder).library
    model = model_of(json.loads(library.to_str()))
    edit(model)
    (folder / "tokenizer.model").write_bytes(written(model))
    return Tokenizer.open(folder)


@pytest.mark.parametrize("name", IDS)
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    shutil.copyfile(DATA / f"{name}.tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.kind, tokenizer.scheme.space_prefix) == ("spm", name == "llama")
    assert {text: tokenizer.encode(text) for text in IDS[name]} == IDS[name]


def test_special_tokens_are_those_that_tokenizer_model_names(tmp_path: Path) -> None:
    shutil.copyfile(DATA / "gemma.tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert (tokenizer.unk_id, tokenizer.adds_bos) == (3, True)
    kinds = {piece.text: piece.kind for piece in tokenizer.pieces()}
    assert (kinds["<table>"], kinds["<pad>"], kinds["<0x0A>"]) == (
        "user_defined",
        "control",
        "byte",
    )


@pytest.mark.parametrize("folder", ["spm", "gemma"], indirect=True)
def test_it_is_the_tokenizer_of_tokenizer_json(
    folder: Path, make_model: Any, request: pytest.FixtureRequest
) -> None:
    style = request.node.callspec.params["folder"]
    same, own = Tokenizer.open(make_model("llama", tokenizer=style)), Tokenizer.open(folder)
    assert own.scheme == same.scheme
    assert own.pieces(416) == same.pieces(416)
    for name in ("bos_id", "eos_ids", "pad_id", "unk_id", "adds_bos", "special"):
        assert getattr(own, name) == getattr(same, name), name
    texts = same.conformance_texts()
    assert [own.encode(text) for text in texts] == [same.encode(text) for text in texts]
    assert own.decode(own.encode(" The fox ñ🙂")) == same.decode(same.encode(" The fox ñ🙂"))


def test_a_folder_with_tokenizer_model_alone_becomes_a_bundle(
    folder: Path, recipe_for: Any, run: Any, tmp_path: Path, at_hand: None
) -> None:
    done = run("export", "--config", recipe_for(tmp_path, folder), "-q")
    assert done.code == 0, done.err
    bundle = tmp_path / "dist" / "pocket"
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert report["tokenizer"]["conforms"] and report["tokenizer"]["checked"] > 60
    inputs = json.loads((bundle / "manifest.json").read_text())["inputs"]
    assert "tokenizer.model" in inputs["tokenizer"]
    quantized = tmp_path / "quantized"
    assert run("quantize", folder, "--method", "rtn", "-q", "-o", quantized).code == 0
    assert Tokenizer.open(quantized).encode("The fox") == Tokenizer.open(folder).encode("The fox")


def test_tokenizer_json_is_taken_where_both_are(folder: Path, make_model: Any) -> None:
    shutil.copyfile(
        make_model("llama", tokenizer="spm") / "tokenizer.json", folder / "tokenizer.json"
    )
    (folder / "tokenizer.model").write_bytes(b"tiktoken's, or left from another tokenizer")
    assert Tokenizer.open(folder).kind == "spm"


def test_tokens_that_other_files_add(folder: Path) -> None:
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit_settings(folder, added_tokens_decoder={})
    with pytest.raises(BadInput, match="eos_token_id = 401 is no id"):
        Tokenizer.open(folder)
    added = {token["content"]: int(index) for index, token in decoder.items()}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("<|im_end|>") == [added["<|im_end|>"]]
    assert "added_tokens.json" in [path.name for path in tokenizer.files]
    (folder / "added_tokens.json").write_text(
        json.dumps({text: i + 1 for text, i in added.items()})
    )
    with pytest.raises(BadInput, match="has the id"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"add_eos_token": True}, Unsupported, "add_eos_token"),
        ({"legacy": False}, Unsupported, "legacy"),
        ({"add_prefix_space": False}, Unsupported, "add_prefix_space"),
        ({"bos_token": "<bos>"}, BadInput, "bos_token '<bos>' is not in"),
        ({"added_tokens_decoder": {"1": {"content": "<s>"}}}, BadInput, "'<s>' has the id 1"),
        ({"added_tokens_decoder": ["<s>"]}, BadInput, "added tokens"),
        ({"added_tokens_decoder": {"1": 7}}, BadInput, "added tokens"),
        (
            {"added_tokens_decoder": {"2": {"content": "<|eos|>", "rstrip": True}}},
            Unsupported,
            "is rstrip",
        ),
    ],
)
def test_settings_that_contradict_or_change_ids(
    folder: Path, settings: dict[str, Any], error: type[SlimportError], message: str
) -> None:
    edit_settings(folder, **{"pad_token": None}, **settings)
    with pytest.raises(error, match=message) as caught:
        Tokenizer.open(folder)
    assert len(str(caught.value).splitlines()) == 3


def test_no_bos_where_the_settings_say_so(folder: Path) -> None:
    edit_settings(folder, add_bos_token=False)
    assert Tokenizer.open(folder).adds_bos is False


def set_piece(index: int, *values: Any) -> Callable[[Model], object]:
    def edit(model: Model) -> None:
        model["pieces"][index][1 : 1 + len(values)] = values

    return edit


def tied(model: Model) -> None:
    first, second = (piece for piece in model["pieces"] if piece[1] in (-3.0, -4.0))
    first[1] = second[1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["trainer"].update({3: 1}), "its model is unigram"),
        (lambda m: m["trainer"].pop(3), "its model is unigram"),
        (lambda m: m["trainer"].update({24: 1}), "at the end of pieces"),
        (lambda m: m["trainer"].update({35: 0}), "256 of 256 byte tokens"),
        (lambda m: m["normalizer"].update({2: b"charsmap"}), "normalizes characters"),
        (lambda m: m["normalizer"].pop(4), "removes extra spaces"),
        (lambda m: m["normalizer"].update({5: 0}), "does not mark spaces"),
        (lambda m: m["pieces"].pop(100), "255 of 256 byte tokens"),
        (set_piece(-1, -9.0, UNUSED), "is unused"),
        (set_piece(-1, 0.0, USER_DEFINED), "is user-defined"),
        (set_piece(0, 0.0, NORMAL), "no unknown token"),
        (tied, "have one score"),
    ],
)
def test_models_that_cannot_be_held(
    folder: Path, edit: Callable[[Model], object], message: str
) -> None:
    edit_settings(folder, added_tokens_decoder={}, pad_token=None)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(Unsupported, match=message) as caught:
        edited(folder, edit)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"IQ== 0\nIg== 1\n",  # tiktoken's, as in Llama 3
        b"version https://git-lfs.github.com/spec/v1\n",
        written({"pieces": [["a", 0.0, 1], ["a", 0.0, 1]], "trainer": {}, "normalizer": {}}),
        written({"pieces": [["a", 0.0, 9]], "trainer": {3: 2}, "normalizer": {4: 0}}),
    ],
)
def test_a_file_that_is_no_model(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadInput, match=r"tokenizer\.model") as caught:
        Tokenizer.open(folder)
    assert caught.value.exit_code == 7


def test_a_damaged_file_is_always_bad_input(tmp_path: Path) -> None:
    """Bytes cut off or changed: an error of ours, or a model that still holds together."""
    whole = (DATA / "gemma.tokenizer.model").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole[: rng.choice((rng.randrange(len(whole)), len(whole)))])
        for _ in range(3):
            damaged[rng.randrange(-300, 0) % max(1, len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            Tokenizer.open(tmp_path)
        except SlimportError:
            refused += 1
    assert refused > 50
