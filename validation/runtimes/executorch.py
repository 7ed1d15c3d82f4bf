"""ExecuTorch as it runs on a device: same file, same kernels, XNNPACK on the CPU.

Fills `validation.runtime.Runtime` for the container executorch. Logits, greedy tokens and speeds
come from the methods of the program, ids from the C++ tokenizer of ExecuTorch's own runner.
Everything happens in a child process (`executorch_worker`), because the libraries write to the
terminal and end the process where a program is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version as distribution
from pathlib import Path
from typing import Any

from ... import log
from ...tokenizer.conformance import Chat
from .. import worker
from ..runtime import (
    SAME_MODEL,
    Generation,
    Ids,
    Measurements,
    Memory,
    Speed,
    Vocabulary,
    as_lists,
    refuse_empty,
    refuse_missing,
)
from ..worker import Progress

EXECUTES = True
PREDICTED = ("mapped", "repacked", "kv_cache", "compute")  # it states none of them
UNKNOWN: tuple[str, ...] = ()
SESSION: Mapping[str, Any] = {
    "backend": "XnnpackBackend",
    "threads": "the CPUs that the process may use",
}
_WORKER = "slimport.validation.runtimes.executorch_worker"


def effort(file: Path) -> None:
    """It is as fast as a recipe needs it."""


def accelerator(file: Path) -> None:
    """It runs on the CPU."""


def version() -> str:
    """Such as "ExecuTorch 1.4.1 with XNNPACK and pytorch-tokenizers 1.5.0"."""
    tokenizers = distribution("pytorch-tokenizers")
    return (
        f"ExecuTorch {distribution('executorch')} with XNNPACK and pytorch-tokenizers {tokenizers}"
    )


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from an empty cache.

    The last tokens of the first window go through the method that a runner calls, one by one, all
    others through the one that gives the logits of every token.

    Args:
        file: `model.pte`.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).
        kv_cache: the dtype that the program has; no other can be asked for.
        adapter: the program of an adapter, which runs in the place of the base's.
        threads: CPU threads; all by default.

    Raises:
        BadInput: no windows, no such file, or windows longer than the program's context.
        ValidationFailed: ExecuTorch refuses the file or crashes.
        EnvironmentFailed: the disk is full.
    """
    refuse_empty(windows)
    arguments = {"windows": windows.tolist(), "out": str(out), **_threads(threads)}
    _call("logits", file, progress, adapter=adapter, **arguments)


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """As `logits`, with every product in float32: XNNPACK else rounds activations to 8 bits.

    A second program is written beside `out` for the time of the run, as the file is but with each
    matrix of codes as what they mean, 4 bytes a weight.

    Raises:
        ValidationFailed: as `logits`.
    """
    refuse_empty(windows)
    arguments = {"windows": windows.tolist(), "out": str(out), **_threads(None)}
    _call("exact_logits", file, adapter=adapter, **arguments)
    return SAME_MODEL


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text by the runner's tokenizer; special tokens in it are parsed."""
    found: list[list[int]] = _call("tokenize", file, texts=list(texts))
    return found


def vocabulary(file: Path) -> Vocabulary:
    """What the program says to a runner; which puts nothing before a text by itself."""
    found = _call("vocabulary", file)
    return Vocabulary(
        size=found["size"],
        eog=tuple(found["eog"]),
        bos=found["bos"],
        adds_bos=None,
        chat_template=None,
    )


def render(file: Path, chats: Sequence[Chat]) -> list[str | None]:
    """None for each: the app renders, by the template beside the file."""
    return [None] * len(chats)


def generate(
    file: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy tokens after each prompt of ids, up to an end-of-generation token.

    ExecuTorch's own runner of language models then has to say the same. It takes and gives texts,
    so it is asked where a prompt's text becomes the same ids again; the log says how often.

    Raises:
        BadInput: an empty prompt, or one longer than the program's context.
        ValidationFailed: ExecuTorch refuses the file or crashes, or its runner says something else.
    """
    ids = as_lists(prompts)
    given = {"prompts": ids, "max_tokens": max_tokens, **_threads(None)}
    found = _call("generate", file, progress, adapter=adapter, **given)
    answers = [tokens for tokens, _ in found]
    asked = _call("require_same_text", file, adapter=adapter, prompts=ids, answers=answers)
    log.say(f"ExecuTorch's runner was asked for {asked} of {len(prompts)} texts, and says the same")
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def measure(
    file: Path,
    context: int,
    prompt_lengths: Sequence[int] = (200, 400, 600, 800, 1000),
    *,
    generated: int = 64,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Time prompts of random tokens; the cache is for the context that the program has.

    After each prompt `generated` tokens are timed, or as many as still fit; a prompt that leaves no
    room for 2 is left out. Memory is what the program says, see executorch_memory.

    Raises:
        ValidationFailed: ExecuTorch refuses the file or crashes.
    """
    arguments: dict[str, Any] = {"context": context, "prompt_lengths": list(prompt_lengths)}
    arguments |= {"generated": max(2, generated), **_threads(None)}
    found = _call("measure", file, progress, adapter=adapter, **arguments)
    return Measurements(
        speed=tuple(Speed(**speed) for speed in found["speed"]),
        memory=Memory(**found["memory"]),
        rss_anon=found["rss_anon"],
        rss_file=found["rss_file"],
    )


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """XNNPACK packs the same weights for every CPU: what was said for this one."""
    return measured


def _threads(threads: int | None) -> dict[str, Any]:
    return {"threads": worker.threads() if threads is None else threads}


def _call(
    job: str,
    file: Path,
    progress: Progress | None = None,
    *,
    adapter: Path | None = None,
    **arguments: Any,
) -> Any:
    """A job on a program; that of an adapter, with what lies beside `file`."""
    refuse_missing(file, "ExecuTorch runs a model.pte")
    if adapter is not None:
        refuse_missing(adapter, "ExecuTorch runs the program of an adapter")
    given = {"file": str(adapter or file), "folder": str(file.parent)}
    return worker.call(_WORKER, job, {**given, **arguments}, progress)
