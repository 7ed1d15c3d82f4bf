"""Pairs of a chosen and a rejected answer, read from JSONL as a reward model learns them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from ..quantize.windows import check_ids, read_utf8, said
from ..tokenizer.tokenizer import Tokenizer
from ..validation.preference import Ids, Pairs

_FORMS = "a line needs `chosen` and `rejected`: strings, or lists of {role, content}"


def read_pairs(
    path: Path, tokenizer: Tokenizer, longest: int, most: int, vocab_size: int
) -> tuple[Pairs, int]:
    """At most `most` pairs of a JSONL file, evenly spread, in TRL's formats.

    A line has `chosen` and `rejected`, and maybe a `prompt` that both answer. Strings are joined as
    they are, and tokenized with the special tokens that the tokenizer adds; where prompt or answers
    are lists of {role, content}, each text is a chat and rendered by the model's template.

    Args:
        longest: tokens of a text; pairs with a longer one are left out, and those of equal texts.

    Returns:
        The pairs, and how many the file has.

    Raises:
        UsageError: there is no such file.
        BadInput: it is not JSONL of pairs, or of strings and chats; all are too long; or an id is
            outside the vocabulary.
    """
    lines = [(n, line) for n, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]
    every = [_pair(path, number, line, tokenizer) for number, line in lines]
    kinds = [chats for chats, _, _ in every]
    if len(set(kinds)) > 1:
        number = lines[kinds.index(not kinds[0])][0]
        raise BadInput(
            f"{path.name}, line {number} is another kind of pair than the lines before",
            "some are strings and some are chats; a reward model was trained on one of them",
            "give a file of either",
        )
    pairs = [(chosen, rejected) for _, chosen, rejected in every]
    fitting = [pair for pair in pairs if max(map(len, pair)) <= longest and pair[0] != pair[1]]
    if not fitting:
        raise BadInput(
            f"{path.name} has no pair to judge a reward model on",
            f"of {len(every)} pairs none has two different texts of at most {longest} tokens",
            "give pairs that fit the context of model and target",
        )
    places = np.linspace(0, len(fitting) - 1, min(most, len(fitting))).astype(np.int64)
    kept = [fitting[place] for place in places]
    for pair in kept:
        for text in pair:
            check_ids(np.array(text, np.int32), tokenizer, vocab_size)
    chosen, rejected = zip(*kept, strict=True)
    return Pairs(chosen, rejected, chats=kinds[0]), len(every)


def _pair(path: Path, number: int, line: str, tokenizer: Tokenizer) -> tuple[bool, Ids, Ids]:
    """Whether it is chats, and both texts."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("it is no object")
        answers = row["chosen"], row["rejected"]
        kinds = {isinstance(answer, str) for answer in answers}
        if len(kinds) > 1:
            raise TypeError("chosen and rejected are a string and a chat")
        chats = not (isinstance(row.get("prompt"), str | None) and kinds == {True})
        write = _chat if chats else _string
        chosen, rejected = (write(row.get("prompt"), answer, tokenizer) for answer in answers)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path.name}, line {number} is no pair", why, _FORMS) from error
    if not chosen or not rejected:
        raise BadInput(f"{path.name}, line {number} is no pair", "a text is empty", _FORMS)
    return chats, chosen, rejected


def _string(prompt: str | None, answer: str, tokenizer: Tokenizer) -> Ids:
    return tuple(tokenizer.encode((prompt or "") + answer, add_special=True))


def _chat(prompt: Any, answer: Any, tokenizer: Tokenizer) -> Ids:
    if not answer:
        raise ValueError("an answer has no message")
    chat = [*said("user", prompt or []), *said("assistant", answer)]
    for message in chat:
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            raise TypeError("the role or content of a message is no text")
    rendered = tokenizer.render_chat(chat, add_generation_prompt=False)
    if rendered is None:
        raise ValueError("its messages need a chat template, and the model has none")
    return tuple(tokenizer.encode(rendered))
