"""Texts and token windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slimport.errors import BadInput, UsageError
from slimport.quantize.windows import read_text, token_windows, windows_of
from slimport.tokenizer.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.open(tiny_llama)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def test_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes('{"text": "no JSON"}\r\n  é\n'.encode())
    assert read_text(path) == '{"text": "no JSON"}\r\n  é\n'


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"text": "a b"}, "a b"),
        ({"prompt": "Two plus", "completion": " two"}, "Two plus two"),
        ({"prompt": "Two plus", "chosen": " two", "rejected": " one"}, "Two plus two"),
        ({"messages": CHAT}, "Hi\n\nHello"),
        ({"prompt": CHAT[:1], "chosen": "Hello"}, "Hi\n\nHello"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "Hi\n\nHello"),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n1, 2\n\n3"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add\n\n3"),
    ],
)
def test_a_line_of_jsonl_is_a_document(tmp_path: Path, line: object, text: str) -> None:
    assert read_text(write(tmp_path, line)) == text
    assert read_text(write(tmp_path, line, {"text": "end"})) == f"{text}\n\nend"


def test_chats_are_rendered_by_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = read_text(write(tmp_path, {"messages": CHAT}), tokenizer.render_chat)
    assert text.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"content": "x"}',
        '{"text": 3}',
        '{"prompt": "x"}',
        '{"prompt": "x", "completion": 4}',
        '{"messages": []}',
        '{"messages": ["x"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(BadInput, match="line 3"):
        read_text(path)


def test_texts_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="byte 3"):
        read_text(path)


def test_missing_texts_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(UsageError):
            read_text(path)


def test_windows_are_spread_over_the_text(tokenizer: Tokenizer) -> None:
    text = " ".join(f"the fox number {n} went home." for n in range(300))
    ids = tokenizer.encode(text)
    windows = token_windows(text, tokenizer, 32, 5, vocab_size=416)
    assert windows.ids.shape == (5, 32) and windows.ids.dtype == np.int32
    assert (windows.ids[:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(windows.ids[0, 1:], ids[:31])
    np.testing.assert_array_equal(windows.ids[2, 1:], ids[(len(ids) - 31) // 2 :][:31])
    np.testing.assert_array_equal(windows.ids[4, 1:], ids[-31:])


def test_a_short_text_gives_the_windows_it_holds(tokenizer: Tokenizer) -> None:
    text = "the fox went home. " * 20
    count = len(tokenizer.encode(text)) // 31
    windows = token_windows(text, tokenizer, 32, 1000, vocab_size=416)
    assert len(windows.ids) == count > 1


def test_a_text_shorter_than_one_window_is_refused(tokenizer: Tokenizer) -> None:
    tokens = len(tokenizer.encode("the fox"))
    with pytest.raises(BadInput, match=f"has {tokens} tokens") as caught:
        token_windows("the fox", tokenizer, 64, 1, vocab_size=416)
    assert "needs 63" in caught.value.why


def test_no_bos_without_a_tokenizer_that_adds_it(tiny_qwen2: Path) -> None:
    tokenizer = Tokenizer.open(tiny_qwen2)
    text = "the fox went home. " * 20
    windows = token_windows(text, tokenizer, 16, 1, vocab_size=416)
    np.testing.assert_array_equal(windows.ids[0], tokenizer.encode(text)[:16])


def test_chat_marks_in_a_text_are_special_ids(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n" * 10
    windows = token_windows(text, tokenizer, 32, 1, vocab_size=416)
    assert (windows.ids == tokenizer.library.token_to_id("<|im_end|>")).sum() >= 2


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="outside the model's vocabulary"):
        token_windows("the fox went home. " * 20, tokenizer, 32, 1, vocab_size=200)


def test_the_digest_covers_ids_and_shape() -> None:
    ids = np.arange(24, dtype=np.int32)
    digests = {
        windows_of(ids.reshape(4, 6)).digest,
        windows_of(ids.reshape(6, 4)).digest,
        windows_of(ids.reshape(4, 6) + 1).digest,
    }
    assert len(digests) == 3
    assert windows_of(ids.reshape(4, 6).astype(np.int32)).digest in digests
