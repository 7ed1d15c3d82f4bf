"""Pairs of a chosen and a rejected answer, read from JSONL as a reward model learns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    they are, and tokenized with the special tokens that the tokenizer adds; where one of them is a
    list of {role, content}, both are a chat and rendered by the model's template.

    Args:
        longest: tokens of a text; pairs with a longer one are left out.

    Returns:
        The pairs, and how many the file has.

    Raises:
        UsageError: there is no such file.
        BadInput: it is not JSONL of pairs, all are too long, or an id is outside the vocabulary.
    """
    lines = [(n, line) for n, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]
    every = [_pair(path, number, line, tokenizer) for number, line in lines]
    fitting = [pair for pair in every if max(map(len, pair)) <= longest]
    if not fitting:
        raise BadInput(
            f"{path.name} has no pair to judge a reward model on",
            f"of {len(every)} pairs none has two texts of at most {longest} tokens",
            "give pairs that fit the context of model and target",
        )
    places = np.linspace(0, len(fitting) - 1, min(most, len(fitting))).astype(np.int64)
    kept = [fitting[place] for place in places]
    for pair in kept:
        for text in pair:
            check_ids(np.array(text, np.int32), tokenizer, vocab_size)
    return Pairs(tuple(one for one, _ in kept), tuple(other for _, other in kept)), len(every)


def _pair(path: Path, number: int, line: str, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("it is no object")
        chosen, rejected = (_text(row, key, tokenizer) for key in ("chosen", "rejected"))
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path.name}, line {number} is no pair", why, _FORMS) from error
    if not chosen or not rejected:
        raise BadInput(f"{path.name}, line {number} is no pair", "a text is empty", _FORMS)
    return chosen, rejected


def _text(row: Mapping[str, Any], key: str, tokenizer: Tokenizer) -> Ids:
    """Prompt and answer as ids."""
    prompt, answer = row.get("prompt"), row[key]
    if isinstance(prompt, str | None) and isinstance(answer, str):
        return tuple(tokenizer.encode((prompt or "") + answer, add_special=True))
    if not answer:
        raise ValueError(f"{key} has no message")
    chat = [*said("user", prompt or []), *said("assistant", answer)]
    if not all(isinstance(message["content"], str) for message in chat):
        raise TypeError("the content of a message is no text")
    rendered = tokenizer.render_chat(chat, add_generation_prompt=False)
    if rendered is None:
        raise ValueError("its messages need a chat template, and the model has none")
    return tuple(tokenizer.encode(rendered))
