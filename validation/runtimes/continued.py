"""How logits and greedy tokens come of a model that continues a text, whatever runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer

Ids = npt.NDArray[np.int32]


class Text(Protocol):
    """A model that reads a text and continues it.

    Attributes:
        vocab_size: numbers of a row of logits.
        context: tokens that a text and its continuation may have.
        stops: ids that end an answer.
    """

    vocab_size: int
    context: int
    stops: tuple[int, ...]

    def reset(self) -> None:
        """Forget the text."""

    def prompt(self, ids: Ids) -> Sequence[Float32]:
        """Logits (n, vocabulary) of the parts of a text's start."""

    def token(self, token: int, position: int) -> Float32:
        """Logits (1, vocabulary) of a token."""


def write_logits(text: Text, windows: list[list[int]], out: str, decoded: int) -> None:
    """Logits at every position of windows; the last `decoded` of the first one come one by one."""
    ids = np.array(windows, np.int32)
    refuse_longer(ids.shape[1], text.context)
    first = max(1, ids.shape[1] - decoded)
    with writer(Path(out), (*ids.shape, text.vocab_size)) as target:
        for index, window in worker.counted(enumerate(ids), len(ids)):
            text.reset()
            split = first if index == 0 else window.size
            for rows in text.prompt(np.ascontiguousarray(window[:split])):
                target.write(np.ascontiguousarray(rows).data)
            for place in range(split, window.size):
                target.write(np.ascontiguousarray(text.token(int(window[place]), place)).data)


def greedy(text: Text, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], bool]]:
    """Tokens after each prompt, and whether one ended them."""
    return [_greedy(text, prompt, max_tokens) for prompt in worker.counted(prompts, len(prompts))]


def refuse_longer(tokens: int, context: int) -> None:
    """Raise BadInput beyond the context."""
    if tokens > context:
        raise BadInput(
            f"a text of {tokens} tokens is too long",
            f"the model is made for a context of {context} tokens",
            "validate with shorter windows or prompts",
        )


def _greedy(text: Text, prompt: list[int], max_tokens: int) -> tuple[list[int], bool]:
    refuse_longer(len(prompt), text.context)
    text.reset()
    tokens: list[int] = []
    row = text.prompt(np.array(prompt, np.int32))[-1][-1]
    for place in range(len(prompt), len(prompt) + max_tokens):
        token = int(row.argmax())
        if token in text.stops:
            return tokens, True
        tokens.append(token)
        if len(tokens) == max_tokens or place >= text.context:
            break
        row = text.token(token, place)[-1]
    return tokens, False
