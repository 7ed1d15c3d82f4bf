"""The child process behind `coreml`: one job on one package.

It gives a function what the README of the bundle gives it: ids of a part of a prompt, and masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BadInput
from ...export.coreml.decoder import FULL, IDS, LOGITS, SLIDING
from ...export.coreml.package import package_of, properties_of
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from . import coreml, coreml_memory, mil
from .refusals import refusals

_PART = 128  # tokens of a prompt at a time, as in README.bundle.md
_DECODED = 4  # tokens of the first window that are given one by one
_MASKED = float(np.finfo(np.float16).min)

Ids = npt.NDArray[np.int32]


class Engine(Protocol):
    """What runs a function of a package, with states that go on from run to run."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """By name."""

    def reset(self) -> None:
        """Forget the text."""

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The function's outputs."""


class _CoreML:
    """Core ML itself, on a Mac."""

    def __init__(self, package: Path) -> None:
        import coremltools

        units = coremltools.ComputeUnit.CPU_AND_GPU
        with refusals(f"Core ML does not load {package.name}"):
            self._model = coremltools.models.MLModel(str(package), compute_units=units)
        self.inputs = {each.name: each for each in self._model.get_spec().description.input}
        self.reset()

    def reset(self) -> None:
        self._state = self._model.make_state()

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        with refusals("Core ML cannot run the package"):
            found = self._model.predict(given, state=self._state)
        return {name: torch.from_numpy(np.asarray(each)) for name, each in found.items()}


class _Model:
    """A package that continues texts.

    Args:
        exact: by the interpreter, without rounding.
    """

    def __init__(self, file: Path, exact: bool = False) -> None:
        torch.set_num_threads(worker.threads())
        package, told = package_of(file), properties_of(file)
        self._interpreter: mil.Interpreter | None = None
        if coreml.EXECUTES and not exact:
            self._engine: Engine = _CoreML(package)
        else:
            self._interpreter = mil.Interpreter(package, rounding="fp32" if exact else "fp16")
            self._engine = self._interpreter
        self.context = int(told["slimport.context_length"])
        self.vocab_size = int(told["slimport.vocab_size"])
        self.stops = {int(each) for each in told["slimport.stop_tokens"].split(",") if each}
        window = told.get("co.huggingface.exporters.sliding_window")
        self._window = self.context if window is None else int(window)

    def reset(self) -> None:
        self._engine.reset()

    def run(self, ids: Ids, position: int) -> Float32:
        """Logits (n, vocabulary) of ids (n,), the first at `position`."""
        total = position + ids.size
        if total > self.context:
            raise BadInput(
                f"a text of {total} tokens is too long",
                f"the package is made for a context of {self.context} tokens",
                "validate with shorter windows or prompts",
            )
        found = self._engine.run(self._inputs(ids, position))
        rows: Float32 = found[LOGITS][0].float().numpy()
        return rows

    def prompt(self, ids: Ids) -> list[Float32]:
        """Logits of the parts of a prompt."""
        places = range(0, ids.size, _PART)
        return [self.run(ids[place : place + _PART], place) for place in places]

    def refuse_overflow(self) -> None:
        """Raise ValidationFailed if a number did not fit float16."""
        if self._interpreter is not None:
            mil.refuse_overflow(self._interpreter.peaks)

    def _inputs(self, ids: Ids, position: int) -> dict[str, Tensor]:
        total = position + ids.size
        ahead = torch.arange(position, total)[:, None] - torch.arange(total)
        given = {IDS: torch.from_numpy(ids)[None]}
        for name, window in ((FULL, self.context), (SLIDING, self._window)):
            if name in self._engine.inputs:
                seen = (ahead >= 0) & (ahead < window)
                mask = torch.zeros(ahead.shape).masked_fill(~seen, _MASKED)
                given[name] = mask.to(torch.float16)[None, None]
        return given


def _logits(file: str, windows: list[list[int]], out: str, exact: bool) -> None:
    ids, model = np.array(windows, np.int32), _Model(Path(file), exact)
    first = max(1, ids.shape[1] - _DECODED)
    with writer(Path(out), (*ids.shape, model.vocab_size)) as target:
        for index, window in worker.counted(enumerate(ids), len(ids)):
            model.reset()
            split = first if index == 0 else window.size
            single = range(split, window.size)
            rows = model.prompt(window[:split])
            rows += [model.run(window[place : place + 1], place) for place in single]
            for part in rows:
                target.write(np.ascontiguousarray(part).data)
    model.refuse_overflow()


def _generate(file: str, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], bool]]:
    model = _Model(Path(file))
    found = [
        _greedy(model, np.array(prompt, np.int32), max_tokens)
        for prompt in worker.counted(prompts, len(prompts))
    ]
    model.refuse_overflow()
    return found


def _greedy(model: _Model, prompt: Ids, max_tokens: int) -> tuple[list[int], bool]:
    model.reset()
    tokens: list[int] = []
    row = model.prompt(prompt)[-1][-1]
    for place in range(prompt.size, prompt.size + max_tokens):
        token = int(row.argmax())
        if token in model.stops:
            return tokens, True
        tokens.append(token)
        if len(tokens) == max_tokens or place >= model.context:
            break
        row = model.run(np.array([token], np.int32), place)[-1]
    return tokens, False


def _memory(file: str) -> dict[str, Any]:
    return coreml_memory.memory(Path(file), _PART).to_json()


JOBS: dict[str, Any] = {"logits": _logits, "generate": _generate, "memory": _memory}

if __name__ == "__main__":
    worker.serve(JOBS)
