"""A Core ML package, run by Core ML itself on a Mac, and by an interpreter elsewhere.

Fills `validation.runtime.Runtime` for the container coreml. Everything happens in a child process
(`coreml_worker`). The interpreter (`mil`) rounds to float16 what the program declares so, as a
phone's GPU does between operations; what happens inside of one it computes in float32.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version as distribution
from pathlib import Path
from typing import Any

from ...export.coreml.adapter import read
from ...export.coreml.package import bundle_of, properties_of
from ...tokenizer.conformance import Chat
from .. import worker
from ..runtime import (
    SAME_MODEL,
    Generation,
    Ids,
    Measurements,
    Memory,
    Vocabulary,
    as_lists,
    refuse_empty,
    refuse_missing,
)
from ..worker import Progress
from . import shipped_tokenizer

EXECUTES = sys.platform == "darwin"
PREDICTED = ("mapped", "repacked", "kv_cache", "compute")  # computed from the package
UNKNOWN = (
    *(() if EXECUTES else ("Core ML: structure checked, not executed; an interpreter was judged",)),
    "iPhone: speed, what Core ML copies or decompresses when it loads, rounding inside of kernels",
)
SESSION: Mapping[str, Any] = {}
# Nats at any token, where constants are float16 in the file, and those of the oracle are not.
ROUNDED = 1e-4
PART = 128  # tokens of a prompt at a time, as in README.bundle.md
_WORKER = "slimport.validation.runtimes.coreml_worker"


def effort(file: Path) -> None:
    """It is nearly as fast as the reference."""


def accelerator(file: Path) -> None:
    """Where Core ML runs an operation is only known on a device."""


def version() -> str:
    """Such as "slimport's MIL interpreter with torch 2.8.0"."""
    if EXECUTES:
        tools = f"coremltools {distribution('coremltools')}"
        return f"Core ML of macOS {platform.mac_ver()[0]} with {tools}"
    return f"slimport's MIL interpreter with torch {distribution('torch')}"


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from an empty cache.

    The last tokens of the first window are given one by one, all others as parts of a prompt.

    Args:
        file: the model file of the package.
        adapter: the file that names its function.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).

    Raises:
        BadInput: no windows, no such file, or windows longer than the package's context.
        ValidationFailed: the program has operations that are not known, or computes numbers that do
            not fit float16.
        EnvironmentFailed: the disk is full.
    """
    refuse_empty(windows)
    given = {"windows": windows.tolist(), "out": str(out), "exact": False}
    _call("logits", file, progress, adapted=_function(adapter), **given)


def exact_logits(
    file: Path, windows: Ids, out: Path, *, adapter: Path | None = None
) -> float | None:
    """As `logits`, and nothing is rounded to float16; on a Mac by the interpreter too."""
    refuse_empty(windows)
    given = {"windows": windows.tolist(), "out": str(out), "exact": True}
    _call("logits", file, adapted=_function(adapter), **given)
    return SAME_MODEL if adapter is None else ROUNDED


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids by the tokenizers library from the shipped tokenizer.json: what an app must give."""
    return shipped_tokenizer.tokenize(bundle_of(file), texts)


def vocabulary(file: Path) -> Vocabulary:
    """What the package and the files beside it say to an app."""
    return shipped_tokenizer.vocabulary(bundle_of(file), properties_of(file))


def render(file: Path, chats: Sequence[Chat]) -> None:
    """The app renders: Core ML does not."""


def generate(
    file: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy tokens after each prompt of ids, up to an end-of-generation token.

    Raises:
        BadInput: an empty prompt, or one longer than the package's context.
        ValidationFailed: as `logits`.
    """
    given = {"prompts": as_lists(prompts), "max_tokens": max_tokens}
    found = _call("generate", file, progress, adapted=_function(adapter), **given)
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def measure(
    file: Path,
    context: int,
    prompt_lengths: Sequence[int] = (),
    *,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Memory as the program says; no speed, because an interpreter's says nothing."""
    memory = Memory(**_call("memory", file, progress, tokens=PART))
    return Measurements(speed=(), memory=memory, rss_anon=None, rss_file=None)


def scores(
    file: Path,
    texts: Sequence[Sequence[int]],
    *,
    exact: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """The score of each text of ids by a reward model, each text alone.

    Args:
        exact: nothing is rounded to float16.

    Raises:
        BadInput: an empty text, or one longer than the package's context.
        ValidationFailed: as `logits`.
    """
    found: list[float] = _call("scores", file, progress, texts=as_lists(texts), exact=exact)
    return found


def measure_scores(
    file: Path,
    context: int,
    lengths: Sequence[int] = (),
    *,
    progress: Progress | None = None,
) -> Measurements:
    """Memory for a text of `context` tokens, as the program says; no speed."""
    memory = Memory(**_call("memory", file, progress, tokens=context))
    return Measurements(speed=(), memory=memory, rss_anon=None, rss_file=None)


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """It does not depend on the phone's CPU."""
    return measured


def _function(adapter: Path | None) -> str | None:
    """The function of an adapter, as its file names it."""
    return None if adapter is None else read(adapter)["function"]


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    refuse_missing(file, "Core ML runs the model of a package")
    return worker.call(_WORKER, job, {"file": str(file), **arguments}, progress)
