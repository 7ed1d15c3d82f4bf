"""Pairs of answers become token ids as a reward model was trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimport.errors import BadInput, UsageError
from slimport.shipping.pairs import read_pairs
from slimport.tokenizer.tokenizer import Tokenizer

ASKED = [{"role": "user", "content": "Hi"}]


def said(words: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": words}]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.open(tiny_llama)


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path, tokenizer: Tokenizer, longest: int = 200, most: int = 200) -> Any:
    return read_pairs(path, tokenizer, longest, most, vocab_size=416)


CHATS = {
    "messages": {"prompt": ASKED, "chosen": said("yes"), "rejected": said("no")},
    "no prompt": {"chosen": ASKED + said("yes"), "rejected": ASKED + said("no")},
    "prompt of messages": {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
    "answers of messages": {"prompt": "Hi", "chosen": said("yes"), "rejected": said("no")},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_chats_are_rendered_by_the_template(row: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs, count = read(write(tmp_path, row), tokenizer)
    for answer, texts in (("yes", pairs.chosen), ("no", pairs.rejected)):
        rendered = tokenizer.render_chat(ASKED + said(answer), add_generation_prompt=False)
        assert rendered is not None
        assert texts == (tuple(tokenizer.encode(rendered)),)
    assert count == 1


@pytest.mark.parametrize("prompt", ["Two plus", None])
def test_strings_are_joined_as_they_are(
    prompt: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row = {"prompt": prompt, "chosen": " two", "rejected": " one"}
    pairs, _ = read(write(tmp_path, row), tokenizer)
    words = (prompt or "") + " two"
    assert pairs.chosen == (tuple(tokenizer.encode(words, add_special=True)),)


def test_long_pairs_are_left_out_and_the_rest_is_evenly_spread(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"chosen": f"{number} yes", "rejected": "no"} for number in range(10)]
    rows[0]["rejected"] = "no " * 300
    pairs, count = read(write(tmp_path, *rows), tokenizer, most=3)
    kept = [tokenizer.decode(text) for text in pairs.chosen]
    assert (kept, count) == (["1 yes", "5 yes", "9 yes"], 10)


WRONG = {
    "text": ("yes", "no object"),
    "no rejected": ({"chosen": "yes"}, "rejected"),
    "number": ({"chosen": 1, "rejected": "no"}, "Error"),
    "no content": ({"chosen": [{"role": "user"}], "rejected": said("no")}, "content"),
    "content of parts": (
        {"chosen": [{"role": "user", "content": [1]}], "rejected": said("no")},
        "text",
    ),
    "prompt": ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "Error"),
    "a string and a chat": ({"chosen": said("yes"), "rejected": "no"}, "a string and a chat"),
    "no role": ({"chosen": [{"content": "yes"}], "rejected": said("no")}, "role"),
    "role null": ({"chosen": [{"role": None, "content": "y"}], "rejected": said("no")}, "role"),
    "empty": ({"chosen": [], "rejected": said("no")}, "no message"),
}


@pytest.mark.parametrize(("row", "why"), WRONG.values(), ids=WRONG)
def test_what_is_no_pair_is_named_by_its_line(
    row: Any, why: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good = {"chosen": "yes", "rejected": "no"}
    with pytest.raises(BadInput, match="line 2 is no pair") as caught:
        read(write(tmp_path, good, row), tokenizer)
    assert why in caught.value.why


def test_files_without_a_pair_that_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = {"chosen": "yes " * 90, "rejected": "no"}
    with pytest.raises(BadInput, match="no pair to judge"):
        read(write(tmp_path, long), tokenizer, longest=50)
    with pytest.raises(BadInput, match="no pair to judge"):
        read(write(tmp_path), tokenizer)
    with pytest.raises(UsageError, match="no text file"):
        read(tmp_path / "nothing.jsonl", tokenizer)


def test_ids_beyond_the_vocabulary_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, {"chosen": "yes", "rejected": "no"})
    with pytest.raises(BadInput, match="outside the model's vocabulary"):
        read_pairs(path, tokenizer, 200, 200, vocab_size=10)


def test_strings_and_chats_in_one_file_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"chosen": "yes", "rejected": "no"}, CHATS["messages"]]
    with pytest.raises(BadInput, match="line 2 is another kind of pair"):
        read(write(tmp_path, *rows), tokenizer)


def test_equal_texts_are_no_pair(tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = {"chosen": "yes", "rejected": "yes"}
    pairs, count = read(write(tmp_path, same, {"chosen": "yes", "rejected": "no"}), tokenizer)
    assert (len(pairs.chosen), count, pairs.chats) == (1, 2, False)
    with pytest.raises(BadInput, match="no pair to judge"):
        read(write(tmp_path, same), tokenizer)


def test_nesting_without_end_is_malformed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BadInput, match="line 1 is no pair"):
        read(path, tokenizer)
