"""The child process behind `executorch`: one job on one program.

The bindings are loaded as they are: the packages around them import torchao and the whole exporter,
which takes ten seconds and prints warnings. Everything is loaded inside of a job, where what a
library prints is kept from the answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import BadInput, ValidationFailed
from ...export.executorch.decoder import ALL_LOGITS, FORWARD
from ...export.executorch.layout import WEIGHTS
from ...export.executorch.tokenizer import TOKENIZER
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from ..runtime import Speed
from . import executorch_exact, executorch_memory, executorch_runner
from .refusals import refusals
from .rss import gained, rss

_KERNELS = ("extension/llm/custom_ops", "kernels/quantized")
_LOG = 1000  # bytes of the log that are looked at
_DECODED = 4  # tokens of the first window that go through the method of a runner, one by one


def runtime(threads: int) -> Any:
    """ExecuTorch's runtime with the kernels that a language model needs."""
    import torch
    from executorch.extension.pybindings import _portable_lib

    for folder in _KERNELS:
        (library,) = (_package() / folder).glob("*aot_lib*")
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    _portable_lib._unsafe_reset_threadpool(threads)
    return _portable_lib


def _package() -> Path:
    found = find_spec("executorch")
    assert found is not None and found.submodule_search_locations, "the parent read its version"
    return Path(found.submodule_search_locations[0])


def weights_of(folder: Path) -> Path | None:
    """The weights that programs in `folder` share; None: they have their own."""
    weights = folder / WEIGHTS
    return weights if weights.exists() else None


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """As `refusals`, with the last line that ExecuTorch wrote to its log: it says more."""
    try:
        with refusals(what):
            yield
    except ValidationFailed as error:
        raise ValidationFailed(error.what, error.why + _logged(), error.cure) from error


def _logged() -> str:
    """The end of this process's log, where that is a file, as in a child."""
    try:
        size = os.fstat(2).st_size
        lines = os.pread(2, _LOG, max(0, size - _LOG)).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return f"; its log ends in {lines[-1].strip()!r}" if lines else ""


class Model(Protocol):
    """A program that is open, with a cache that goes on from run to run.

    Attributes:
        vocab_size, context: as the program says.
        chunk: tokens of the longest run of ALL_LOGITS.
    """

    vocab_size: int
    context: int
    chunk: int

    def names(self) -> Collection[str]:
        """Its methods."""

    def told(self, name: str) -> list[int]:
        """What a method of numbers returns."""

    def run(self, method: str, ids: npt.NDArray[np.int32], position: int) -> Float32:
        """Logits float32 (rows, vocabulary): they stand until the method runs again, as long as
        the model lives.

        Raises:
            BadInput: as `refuse_longer`.
        """


def refuse_longer(model: Model, tokens: int) -> None:
    """Raise BadInput beyond the context, where a kernel would fail."""
    if tokens > model.context:
        raise BadInput(
            f"a text of {tokens} tokens is too long",
            f"the program is made for a context of {model.context} tokens",
            "validate with shorter windows or prompts",
        )


class _Model:
    """A program as a runner opens it, with the weights in `folder` if they lie outside of it.

    Each method has a cache of its own.
    """

    def __init__(self, file: Path, folder: Path, threads: int) -> None:
        portable, weights = runtime(threads), weights_of(folder)
        with _refusals(f"ExecuTorch does not load {file.name}"):
            given = (str(file),) if weights is None else (str(file), str(weights))
            self.module = portable._load_for_executorch(*given)
            self.vocab_size, self.context = (
                self.told(name)[0] for name in ("get_vocab_size", "get_max_context_len")
            )
            _, self.chunk = self.module.method_meta(ALL_LOGITS).input_tensor_meta(0).sizes()

    def names(self) -> Collection[str]:
        found: list[str] = self.module.method_names()
        return found

    def told(self, name: str) -> list[int]:
        found: list[int] = self.module.run_method(name, ())
        return found

    def run(self, method: str, ids: npt.NDArray[np.int32], position: int) -> Float32:
        import torch

        refuse_longer(self, position + ids.size)
        given = (torch.from_numpy(ids.astype(np.int64))[None], torch.tensor([position]))
        with _refusals("ExecuTorch cannot run the program"):
            (found,) = self.module.run_method(method, given, clone_outputs=False)
        rows: Float32 = found[0].numpy()
        return rows


def _logits(file: str, folder: str, windows: list[list[int]], out: str, threads: int) -> None:
    write_logits(lambda: _Model(Path(file), Path(folder), threads), windows, out)


def write_logits(opened: Callable[[], Model], windows: list[list[int]], out: str) -> None:
    """Logits of the first window's last tokens as a runner asks for them, and of all others.

    Args:
        opened: opens the program, twice: each method packs the weights for itself.
        out: becomes a .npy file of float32 (n, length, vocabulary).

    Raises:
        BadInput: windows longer than the context.
    """
    ids, model = np.array(windows, np.int32), opened()
    refuse_longer(model, ids.shape[1])
    first = _as_a_runner(model, ids[0])
    model = opened()
    with writer(Path(out), (*ids.shape, model.vocab_size)) as target:
        for index, window in worker.counted(enumerate(ids), len(ids)):
            left = window.size - (len(first) if index == 0 else 0)
            for start in range(0, left, model.chunk):
                rows = model.run(ALL_LOGITS, window[start : min(start + model.chunk, left)], start)
                target.write(np.ascontiguousarray(rows).data)
            if index == 0:
                target.write(np.ascontiguousarray(first).data)


def _as_a_runner(model: Model, ids: npt.NDArray[np.int32]) -> Float32:
    """Logits of the last tokens: of the end of a prompt, then of one token after the other."""
    start = max(1, ids.size - _DECODED)
    parts = [(0, start), *((place, place + 1) for place in range(start, ids.size))]
    return np.concatenate(
        [model.run(FORWARD, ids[begin:end], begin).copy() for begin, end in parts]
    )


def _exact_logits(file: str, folder: str, windows: list[list[int]], out: str, threads: int) -> None:
    exact = Path(out).with_suffix(".exact.pte")
    try:
        executorch_exact.write(Path(file), exact, weights_of(Path(folder)))
        _logits(str(exact), folder, windows, out, threads)
    finally:
        exact.unlink(missing_ok=True)


def _tokenize(file: str, folder: str, texts: list[str]) -> list[list[int]]:
    tokenizer = tokenizer_in(folder)
    with _refusals("ExecuTorch's tokenizer cannot read a text"):
        return [list(tokenizer.encode(text)) for text in texts]


def tokenizer_in(folder: str) -> Any:
    """The tokenizer of ExecuTorch's runner, with the file in `folder`."""
    from pytorch_tokenizers import pytorch_tokenizers_cpp

    tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
    with _refusals("ExecuTorch's tokenizer cannot read its file"):
        tokenizer.load(str(Path(folder) / TOKENIZER))
    return tokenizer


def _vocabulary(file: str, folder: str) -> dict[str, Any]:
    return vocabulary_of(_Model(Path(file), Path(folder), 1))


def vocabulary_of(model: Model) -> dict[str, Any]:
    """What a program says to a runner."""
    return {
        "size": model.vocab_size,
        "eog": model.told("get_eos_ids"),
        "bos": model.told("get_bos_id")[0] if "get_bos_id" in model.names() else None,
    }


def _generate(
    file: str, folder: str, prompts: list[list[int]], max_tokens: int, threads: int
) -> list[tuple[list[int], bool]]:
    return greedy(_Model(Path(file), Path(folder), threads), folder, prompts, max_tokens)


def greedy(
    model: Model, folder: str, prompts: list[list[int]], max_tokens: int
) -> list[tuple[list[int], bool]]:
    """Tokens after each prompt, and whether one ended them."""
    ends, known = set(model.told("get_eos_ids")), int(tokenizer_in(folder).vocab_size())
    return [
        _greedy(model, np.array(prompt, np.int32), max_tokens, ends, known)
        for prompt in worker.counted(prompts, len(prompts))
    ]


def _require_same_text(
    file: str, folder: str, prompts: list[list[int]], answers: list[list[int]]
) -> int:
    """How many of the prompts ExecuTorch's own runner was asked to continue."""
    runtime(worker.threads())
    place = Path(folder)
    context = _Model(Path(file), place, 1).context
    what = f"ExecuTorch's runner cannot continue a text with {Path(file).name}"
    with _refusals(what):
        found = executorch_runner.load_runner(
            _package(), Path(file), place / TOKENIZER, weights_of(place)
        )
        return executorch_runner.require_same_text(
            *found, tokenizer_in(folder), prompts, answers, context
        )


def _greedy(
    model: Model, prompt: npt.NDArray[np.int32], max_tokens: int, ends: set[int], known: int
) -> tuple[list[int], bool]:
    """As the runner: among the ids that its tokenizer knows, the rows beyond them are padding."""
    tokens: list[int] = []
    position = 0
    while len(tokens) < max_tokens and position < model.context:
        token = int(model.run(FORWARD, prompt, position)[-1][:known].argmax())
        if token in ends:
            return tokens, True
        tokens.append(token)
        position, prompt = position + prompt.size, np.array([token], np.int32)
    return tokens, False


def _measure(
    file: str,
    folder: str,
    context: int,
    prompt_lengths: list[int],
    generated: int,
    threads: int,
) -> dict[str, Any]:
    runtime(threads)
    before = rss()
    model = _Model(Path(file), Path(folder), threads)
    context = min(context, model.context)
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=context, dtype=np.int32)
    if context > 2:
        _time(model, tokens[: min(32, context - 2)], 2)  # the first run: not timed
    fitting = [length for length in prompt_lengths if length + 2 <= context]
    speed = [
        _time(model, tokens[:length], min(generated, context - length))
        for length in worker.counted(fitting, len(fitting))
    ]
    memory = executorch_memory.memory(Path(file), weights_of(Path(folder)))
    return {"speed": speed, "memory": memory.to_json(), **gained(before)}


def _time(model: _Model, prompt: npt.NDArray[np.int32], generated: int) -> dict[str, Any]:
    start = time.perf_counter()
    token = model.run(FORWARD, prompt, 0)[-1].argmax()
    first = time.perf_counter()
    for position in range(prompt.size, prompt.size + generated - 1):
        token = model.run(FORWARD, np.array([token], np.int32), position)[-1].argmax()
    end = time.perf_counter()
    return Speed.of(prompt.size, generated, start, first, end).to_json()


JOBS: dict[str, Any] = {
    "logits": _logits,
    "exact_logits": _exact_logits,
    "tokenize": _tokenize,
    "vocabulary": _vocabulary,
    "generate": _generate,
    "require_same_text": _require_same_text,
    "measure": _measure,
}

if __name__ == "__main__":
    worker.serve(JOBS)
