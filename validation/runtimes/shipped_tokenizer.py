"""A shipped tokenizer.json and its settings, for runtimes that have no tokenizer of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...export.coreml.tokenizer import SETTINGS, TOKENIZER
from ..runtime import Vocabulary


def library(folder: Path) -> Any:
    """The tokenizers library's object of a folder's tokenizer.json."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / TOKENIZER))
    found.no_truncation()
    found.no_padding()
    return found


def tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text: what an app must give. Special tokens in it are parsed."""
    found = library(folder)
    return [list(found.encode(text, add_special_tokens=False).ids) for text in texts]


def vocabulary(folder: Path, told: Mapping[str, str]) -> Vocabulary:
    """What the files say to an app; `told` stands in the metadata of Apple's models."""
    settings, bos = read_json(folder / SETTINGS), told.get("slimport.bos_token")
    return Vocabulary(
        size=library(folder).get_vocab_size(with_added_tokens=True),
        eog=stops(told),
        bos=None if bos is None else int(bos),
        adds_bos=bool(settings["add_bos_token"]),
        chat_template=settings.get("chat_template"),
    )


def stops(told: Mapping[str, str]) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tuple(int(each) for each in told["slimport.stop_tokens"].split(",") if each)
