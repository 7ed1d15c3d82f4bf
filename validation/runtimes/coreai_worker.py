"""The child process behind `coreai`: one job on one file, in Apple's own runtime for Linux."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from ...export.coreai import reader
from ...quantize.grid import Float32
from .. import worker
from . import coreai
from .continued import Ids, greedy, write_logits
from .refusals import refusals
from .shipped_tokenizer import stops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

_FUNCTION, _INPUTS, _OUTPUT = "main", ("tokens", "position"), "logits"


class _Text:
    """A text that a program reads and continues.

    Raises:
        BadInput: the file is damaged: Apple's loader would run it, or end the process.
    """

    def __init__(self, file: Path) -> None:
        reader.File(file.parents[1])
        told = coreai.told(file)
        self.context = int(told["slimport.context_length"])
        self.vocab_size = int(told["slimport.vocab_size"])
        self.stops = stops(told)
        self._loop = asyncio.new_event_loop()
        with refusals("Core AI does not load the model"):
            asset = AIModelAsset.load(file.parent)
            self._opened = asset.executable()  # what it compiled lies there as long as this lives
            model = self._await(self._opened.__aenter__())
            self._function = model.load_function(_FUNCTION)
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        described = self._function.desc
        self._states = {
            name: NDArray(np.zeros(described.state_descriptor(name).shape, np.float32))
            for name in described.state_names
        }

    def prompt(self, ids: Ids) -> list[Float32]:
        """Logits (n, vocabulary) of a text's start, at once."""
        return [self._run(ids, 0)]

    def token(self, token: int, position: int) -> Float32:
        """Logits (1, vocabulary) of a token."""
        return self._run(np.array([token], np.int32), position)

    def _run(self, ids: Ids, position: int) -> Float32:
        places = np.array([position], np.int32)
        given = {_INPUTS[0]: NDArray(ids[None]), _INPUTS[1]: NDArray(places)}
        with refusals("Core AI cannot run the model"):
            found = self._await(self._function(given, self._states))
        rows: Float32 = found[_OUTPUT].numpy()[0].copy()
        return rows

    def _await(self, job: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(job)


def _logits(file: str, windows: list[list[int]], out: str) -> None:
    write_logits(_Text(Path(file)), windows, out, coreai.DECODED)


def _generate(file: str, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], bool]]:
    return greedy(_Text(Path(file)), prompts, max_tokens)


if __name__ == "__main__":
    worker.serve({"logits": _logits, "generate": _generate})
