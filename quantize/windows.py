"""Texts become token windows, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, UsageError
from ..tokenizer.tokenizer import Tokenizer

Int32 = npt.NDArray[np.int32]
IN_MEMORY = 256 << 20  # bytes of activations that calibration holds without a temporary file
Messages = Sequence[Mapping[str, str]]


class RenderChat(Protocol):
    """Tokenizer.render_chat."""

    def __call__(self, messages: Messages, add_generation_prompt: bool) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, each an independent context.

    Attributes:
        ids: int32 (windows, length).
        digest: `sha256:...` over shape and ids.
    """

    ids: Int32
    digest: str


def read_text(path: Path, render: RenderChat | None = None) -> str:
    """Read a calibration or evaluation text, UTF-8.

    A file named `*.jsonl` has one JSON object per line, each a document (joined by blank lines):
    `text`; or `messages` (a list of {role, content}); or `prompt` with `completion` or `chosen`
    (strings are joined as they are, lists of messages are one chat); or `instruction` with
    `output` and maybe `input`, a chat of two messages. Any other file is plain text.

    Args:
        render: writes a chat as the model reads it (Tokenizer.render_chat). Without it, or where
            it returns None, the contents of the messages are joined by blank lines.

    Raises:
        UsageError: there is no such file.
        BadInput: not UTF-8, or a line is malformed.
    """
    text = read_utf8(path)
    if path.suffix != ".jsonl":
        return text
    lines = enumerate(text.split("\n"), start=1)
    return "\n\n".join(_document(path, n, line, render) for n, line in lines if line.strip())


def read_utf8(path: Path) -> str:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
        UsageError: there is no such file.
        BadInput: not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(
            f"no text file {path}", "the path does not exist or is a folder", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8",
            f"byte {error.start} cannot be decoded",
            "convert the file: iconv -t UTF-8",
        ) from error


def _document(path: Path, number: int, line: str, render: RenderChat | None) -> str:
    """The text of one line of JSONL."""
    try:
        match json.loads(line):
            case {"text": str(text)}:
                return text
            case {"messages": [_, *_] as messages}:
                return _chat(messages, render)
            case {"prompt": prompt, "completion": answer} | {"prompt": prompt, "chosen": answer}:
                if isinstance(prompt, str) and isinstance(answer, str):
                    return prompt + answer
                return _chat([*said("user", prompt), *said("assistant", answer)], render)
            case {"instruction": str(asked), "output": str(answer), **others}:
                asked += f"\n{others['input']}" if others.get("input") else ""
                return _chat([*said("user", asked), *said("assistant", answer)], render)
        why = "no text, messages, prompt with completion or chosen, instruction with output"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise BadInput(f"{path}, line {number} is malformed", why, "correct or remove the line")


def said(role: str, content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages as they are, or a text as the only message of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _chat(messages: list[dict[str, str]], render: RenderChat | None) -> str:
    contents = [message["content"] for message in messages]
    rendered = render(messages, add_generation_prompt=False) if render else None
    return "\n\n".join(contents) if rendered is None else rendered


def token_windows(
    text: str, tokenizer: Tokenizer, length: int, count: int, *, vocab_size: int
) -> Windows:
    """Cut a text into at most `count` windows of `length` tokens, evenly spread, not overlapping.

    Every window starts with BOS if the tokenizer adds one. Special tokens written in the text are
    special ids. A text too short for `count` windows gives as many as it holds.

    Raises:
        BadInput: the text is too short for one window, or an id is outside the vocabulary.
    """
    ids = np.array(tokenizer.encode(text), np.int32)
    if ids.size:
        check_ids(ids, tokenizer, vocab_size)
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return cut(ids, start, length, count)


def cut(ids: Int32, start: Sequence[int], length: int, count: int) -> Windows:
    """The ids of a text as `token_windows`, each window after the ids `start`.

    Raises:
        BadInput: they are too few for one window.
    """
    body = length - len(start)
    if ids.size < body:
        raise BadInput(
            f"the text has {ids.size} tokens",
            f"one window of {length} tokens needs {body} of them",
            "give a longer text, or ask for shorter windows",
        )
    count = min(count, ids.size // body)
    begins = np.linspace(0, ids.size - body, count).astype(np.int64)
    bodies = ids[begins[:, None] + np.arange(body)]
    starts = np.broadcast_to(np.array(start, np.int32), (count, len(start)))
    return windows_of(np.hstack((starts, bodies)))


def windows_of(ids: Int32) -> Windows:
    """Windows from ids (windows, length)."""
    ids = np.ascontiguousarray(ids, np.int32)
    digest = hashlib.sha256(f"{ids.shape[0]} {ids.shape[1]}\n".encode())
    digest.update(np.ascontiguousarray(ids, "<i4").data)
    return Windows(ids, f"sha256:{digest.hexdigest()}")


def check_ids(ids: Int32, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise BadInput if an id is outside the model's vocabulary."""
    highest = int(ids.max())
    if highest >= vocab_size:
        raise BadInput(
            f"token {highest} ({tokenizer.decode([highest])!r}) is outside the model's vocabulary",
            f"the tokenizer gives ids up to {highest}, the embedding has {vocab_size} rows",
            "use the tokenizer that the model was trained with",
        )
