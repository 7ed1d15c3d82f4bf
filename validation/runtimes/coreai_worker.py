"""The child process behind `coreai`: one job on one file, in Apple's own runtime for Linux."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from ...export.coreai import reader
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from . import coreai
from .refusals import refusals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

_FUNCTION, _INPUTS, _OUTPUT = "main", ("tokens", "position"), "logits"

Ids = npt.NDArray[np.int32]


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
        self.stops = {int(each) for each in told["slimport.stop_tokens"].split(",") if each}
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

    def run(self, ids: Ids, position: int) -> Float32:
        """Logits (n, vocabulary) of ids (n,), the first at `position`."""
        if position + ids.size > self.context:
            raise BadInput(
                f"a text of {position + ids.size} tokens is too long",
                f"the model is made for a context of {self.context} tokens",
                "validate with shorter windows or prompts",
            )
        places = np.array([position], np.int32)
        given = {_INPUTS[0]: NDArray(ids[None]), _INPUTS[1]: NDArray(places)}
        with refusals("Core AI cannot run the model"):
            found = self._await(self._function(given, self._states))
        rows: Float32 = found[_OUTPUT].numpy()[0].copy()
        return rows

    def _await(self, job: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(job)


def _logits(file: str, windows: list[list[int]], out: str) -> None:
    ids, model = np.array(windows, np.int32), _Text(Path(file))
    first = max(1, ids.shape[1] - coreai.DECODED)
    with writer(Path(out), (*ids.shape, model.vocab_size)) as target:
        for index, window in worker.counted(enumerate(ids), len(ids)):
            model.reset()
            split = first if index == 0 else window.size
            parts = [(0, split), *((place, place + 1) for place in range(split, window.size))]
            for start, stop in parts:
                rows = model.run(np.ascontiguousarray(window[start:stop]), start)
                target.write(np.ascontiguousarray(rows).data)


def _generate(file: str, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], bool]]:
    model = _Text(Path(file))
    return [
        _greedy(model, np.array(prompt, np.int32), max_tokens)
        for prompt in worker.counted(prompts, len(prompts))
    ]


def _greedy(model: _Text, prompt: Ids, max_tokens: int) -> tuple[list[int], bool]:
    model.reset()
    tokens: list[int] = []
    row = model.run(prompt, 0)[-1]
    for place in range(prompt.size, prompt.size + max_tokens):
        token = int(row.argmax())
        if token in model.stops:
            return tokens, True
        tokens.append(token)
        if len(tokens) == max_tokens or place >= model.context:
            break
        row = model.run(np.array([token], np.int32), place)[-1]
    return tokens, False


if __name__ == "__main__":
    worker.serve({"logits": _logits, "generate": _generate})
