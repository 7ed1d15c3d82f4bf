"""The child process behind `coreml`: one job on one package.

It gives functions what the README of the bundle gives them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ...export.coreml.decoder import FULL, IDS, SCORE, SLIDING
from ...export.coreml.package import bundle_of, package_of, packages_in, properties_of
from ...export.coreml.skeleton import LOGITS
from ...export.coreml_ane import DECODE, PREFILL, function_name
from ...export.coreml_ane.decoder import HANDED_ON, HIDDEN, POSITION
from ...quantize.grid import Float32
from .. import worker
from . import coreml, coreml_memory, mil
from .continued import Ids, greedy, refuse_longer, write_logits
from .refusals import refusals
from .shipped_tokenizer import stops

_DECODED = 4  # tokens of the first window that are given one by one
_MASKED = float(np.finfo(np.float16).min)


class Engine(Protocol):
    """What runs the functions of a package, with states that they share and that go on."""

    @property
    def inputs(self) -> Collection[str]:
        """Of the function that runs by default."""

    def reset(self) -> None:
        """Forget the text."""

    def run(self, inputs: Mapping[str, Tensor], function: str | None = None) -> dict[str, Tensor]:
        """The function's outputs."""

    def refuse_overflow(self) -> None:
        """Raise ValidationFailed if a number did not fit float16."""


class _Interpreted:
    """The MIL interpreter."""

    def __init__(
        self, package: Path, functions: Sequence[str | None], exact: bool, room: int
    ) -> None:
        self._states = mil.States()
        rounding: Literal["fp16", "fp32"] = "fp32" if exact else "fp16"
        self._functions = {
            name: mil.Interpreter(package, name, rounding=rounding, room=room, states=self._states)
            for name in functions
        }
        self.inputs = self._functions[functions[0]].inputs.keys()

    def reset(self) -> None:
        self._states.reset()

    def run(self, inputs: Mapping[str, Tensor], function: str | None = None) -> dict[str, Tensor]:
        return self._functions[function].run(inputs)

    def refuse_overflow(self) -> None:
        for function in self._functions.values():
            mil.refuse_overflow(function.peaks)


class _CoreML:
    """Core ML itself, on a Mac."""

    def __init__(self, package: Path, functions: Sequence[str | None], units: str) -> None:
        import coremltools

        unit = getattr(coremltools.ComputeUnit, units)
        with refusals(f"Core ML does not load {package.name}"):
            self._functions = {
                name: coremltools.models.MLModel(
                    str(package), compute_units=unit, function_name=name
                )
                for name in functions
            }
            for model in self._functions.values():
                if model._framework_error is not None:  # it only warns
                    raise model._framework_error
            self._first = self._functions[functions[0]]
            described = _described(self._first.get_spec().description, functions[0])
            self._has_states = bool(described.state)
            self.reset()
        self.inputs = [each.name for each in described.input]

    def reset(self) -> None:
        self._state = self._first.make_state() if self._has_states else None

    def run(self, inputs: Mapping[str, Tensor], function: str | None = None) -> dict[str, Tensor]:
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        with refusals("Core ML cannot run the package"):
            found = self._functions[function].predict(given, state=self._state)
        return {name: torch.from_numpy(np.asarray(each)) for name, each in found.items()}

    def refuse_overflow(self) -> None:
        """What it rounds inside it does not tell."""


def _described(description: Any, function: str | None) -> Any:
    """Inputs and states of a function; the model itself has none where it has several."""
    several = {each.name: each for each in description.functions}
    return several[function or description.defaultFunctionName] if several else description


def _engine(
    package: Path,
    functions: Sequence[str | None],
    exact: bool,
    units: str = "CPU_AND_GPU",
    room: int = mil.ROOM,
) -> Engine:
    """`room`: bytes that each function may take for weights in float32."""
    if coreml.EXECUTES and not exact:
        return _CoreML(package, functions, units)
    return _Interpreted(package, functions, exact, room)


class Model(Protocol):
    """Packages that continue a text.

    Attributes:
        engines: that run them, in their order.
        chunk: tokens of a prompt that are given at a time.
    """

    engines: Sequence[Engine]
    chunk: int

    def run(self, ids: Ids, position: int) -> Float32:
        """Logits (n, vocabulary) of ids (n,), the first at `position`."""


class _Flexible:
    """A package that takes parts of a prompt as long as they are, with masks."""

    def __init__(
        self, file: Path, told: Mapping[str, str], exact: bool, adapted: str | None
    ) -> None:
        self._engine, self._function = _engine(package_of(file), [adapted], exact), adapted
        self.engines: Sequence[Engine] = [self._engine]
        self.chunk = coreml.PART
        self._context = int(told["slimport.context_length"])
        window = told.get("co.huggingface.exporters.sliding_window")
        self._window = self._context if window is None else int(window)

    def run(self, ids: Ids, position: int) -> Float32:
        total = position + ids.size
        ahead = torch.arange(position, total)[:, None] - torch.arange(total)
        given = {IDS: torch.from_numpy(ids)[None]}
        for name, window in ((FULL, self._context), (SLIDING, self._window)):
            if name in self._engine.inputs:
                seen = (ahead >= 0) & (ahead < window)
                mask = torch.zeros(ahead.shape).masked_fill(~seen, _MASKED)
                given[name] = mask.to(torch.float16)[None, None]
        rows: Float32 = self._engine.run(given, self._function)[LOGITS][0].float().numpy()
        return rows


class _Fixed:
    """Packages that run one after the other, for whole chunks of a prompt or for one token."""

    def __init__(
        self, file: Path, told: Mapping[str, str], exact: bool, adapted: str | None
    ) -> None:
        names = packages_in(bundle_of(file))
        self._decode, self._prefill = (function_name(role, adapted) for role in (DECODE, PREFILL))
        functions = [self._decode, self._prefill]
        room = mil.ROOM // (len(names) * len(functions))
        self.engines: Sequence[Engine] = [
            _engine(bundle_of(file) / name, functions, exact, "CPU_AND_NE", room) for name in names
        ]
        self.chunk = int(told["slimport.chunk"])

    def run(self, ids: Ids, position: int) -> Float32:
        one = ids.size == 1
        filled = np.zeros(1 if one else self.chunk, np.int32)
        filled[: ids.size] = ids
        given = {IDS: torch.from_numpy(filled)[None]}
        where = torch.tensor([position], dtype=torch.int32)
        for engine in self.engines:
            found = engine.run({**given, POSITION: where}, self._decode if one else self._prefill)
            if LOGITS in found:
                rows: Float32 = found[LOGITS][0, : ids.size].float().numpy()
                return rows
            given = {HIDDEN: found[HANDED_ON]}
        raise AssertionError("the last package gives logits")


class _Text:
    """A text that packages read and continue.

    Args:
        exact: by the interpreter, without rounding.
        adapted: the function of an adapter; None: that of the base.
    """

    def __init__(self, file: Path, exact: bool, adapted: str | None) -> None:
        torch.set_num_threads(worker.threads())
        told = properties_of(file)
        self.context = int(told["slimport.context_length"])
        self.vocab_size = int(told["slimport.vocab_size"])
        self.stops = stops(told)
        opened = _Fixed if "slimport.chunk" in told else _Flexible
        self._model: Model = opened(file, told, exact, adapted)

    def reset(self) -> None:
        for engine in self._model.engines:
            engine.reset()

    def prompt(self, ids: Ids) -> list[Float32]:
        """Logits of the parts of a prompt, from the text's start on."""
        chunk = self._model.chunk
        places = range(0, ids.size, chunk)
        return [self._model.run(ids[place : place + chunk], place) for place in places]

    def token(self, token: int, position: int) -> Float32:
        """Logits (1, vocabulary) of a token."""
        return self._model.run(np.array([token], np.int32), position)

    def refuse_overflow(self) -> None:
        """Raise ValidationFailed if a number did not fit float16."""
        for engine in self._model.engines:
            engine.refuse_overflow()


def _logits(
    file: str, windows: list[list[int]], out: str, exact: bool, adapted: str | None
) -> None:
    model = _Text(Path(file), exact, adapted)
    write_logits(model, windows, out, _DECODED)
    model.refuse_overflow()


def _generate(
    file: str, prompts: list[list[int]], max_tokens: int, adapted: str | None
) -> list[tuple[list[int], bool]]:
    model = _Text(Path(file), False, adapted)
    found = greedy(model, prompts, max_tokens)
    model.refuse_overflow()
    return found


def _scores(file: str, texts: list[list[int]], exact: bool) -> list[float]:
    path = Path(file)
    torch.set_num_threads(worker.threads())
    told = properties_of(path)
    context, padding = int(told["slimport.context_length"]), told.get("slimport.pad_token")
    engine, found = _engine(package_of(path), [None], exact), list[float]()
    for text in worker.counted(texts, len(texts)):
        refuse_longer(len(text), context)
        while len(text) > 1 and str(text[-1]) == padding:  # as transformers: it is not scored
            text = text[:-1]
        given = {IDS: torch.tensor([text], dtype=torch.int32)}
        found.append(float(engine.run(given)[SCORE][0]))
    engine.refuse_overflow()
    return found


def _memory(file: str, tokens: int) -> dict[str, Any]:
    return coreml_memory.memory(Path(file), tokens).to_json()


JOBS: dict[str, Any] = {
    "logits": _logits,
    "generate": _generate,
    "memory": _memory,
    "scores": _scores,
}

if __name__ == "__main__":
    worker.serve(JOBS)
