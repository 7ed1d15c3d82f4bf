"""ONNX Runtime as it runs on a device: same files, same operators, same session options.

Fills `validation.runtime.Runtime` for the containers onnx and ort, and `Scorer` for onnx. Logits of
whole windows and scores come from ONNX Runtime's own session; tokenizer, text and speeds of a
language model from onnxruntime-genai, as in an app. Everything happens in a child process
(`onnxruntime_worker`), which imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version as distribution
from pathlib import Path
from typing import Any

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
# What the session of `logits` is told: what may change bits is not left to defaults.
# genai's sessions are as genai_config.json says. Names are those of ONNX Runtime.
SESSION: Mapping[str, Any] = {
    "providers": ["CPUExecutionProvider"],
    "graph_optimization_level": "ORT_ENABLE_ALL",
    "execution_mode": "ORT_SEQUENTIAL",
    "threads": {"intra_op": "the CPUs that the process may use", "inter_op": 1},
    "accuracy_level": {"logits": 4, "exact_logits": 1},  # of MatMulNBits: as in the file; float32
    "config_entries": {
        "session.disable_prepacking": "0",
        "mlas.disable_kleidiai": "0",
        "mlas.use_lut_gemm": "0",
    },
}
_WORKER = "slimport.validation.runtimes.onnxruntime_worker"


def effort(file: Path) -> None:
    """It is as fast as a recipe needs it."""


def accelerator(file: Path) -> None:
    """It runs on the CPU."""


def version() -> str:
    """Such as "ONNX Runtime 1.31.1 with onnxruntime-genai 0.18.0"."""
    genai = distribution("onnxruntime-genai")
    return f"ONNX Runtime {distribution('onnxruntime')} with onnxruntime-genai {genai}"


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

    Args:
        file: `model.onnx`, its data beside it, or `model.ort`.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).
        kv_cache: the dtype that the graph has; no other can be asked for.
        adapter: an `.onnx_adapter` file applied at run time.
        threads: CPU threads; all by default.

    Raises:
        BadInput: no windows, or no such file.
        ValidationFailed: ONNX Runtime refuses the files, or hands work to another provider.
        EnvironmentFailed: the disk is full.
    """
    _run(file, windows, out, adapter, False, threads, progress)


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """As `logits`, with every number in float32 and no int8 activations.

    Raises:
        ValidationFailed: as `logits`, or a number that the file has in float16 does not fit it.
    """
    _run(file, windows, out, adapter, True, None, None)
    return SAME_MODEL


def _run(
    file: Path,
    windows: Ids,
    out: Path,
    adapter: Path | None,
    exact: bool,
    threads: int | None,
    progress: Progress | None,
) -> None:
    refuse_empty(windows)
    arguments = {"windows": windows.tolist(), "out": str(out), "exact": exact}
    arguments |= {"threads": worker.threads() if threads is None else threads}
    _call("logits", file, progress, **arguments, **_adapter(adapter))


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text by genai's tokenizer: no special tokens added, those in it parsed."""
    found: list[list[int]] = _call("tokenize", file, texts=list(texts))
    return found


def vocabulary(file: Path) -> Vocabulary:
    """What genai read of the tokenizer: where it stops, what it adds."""
    found = _call("vocabulary", file)
    return Vocabulary(**{**found, "eog": tuple(found["eog"])})


def render(file: Path, chats: Sequence[Chat]) -> list[str | None]:
    """Prompts by genai's own engine for templates; None for what it refuses."""
    found: list[str | None] = _call("render", file, chats=list(chats))
    return found


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

    Raises:
        BadInput: an empty prompt.
        ValidationFailed: genai refuses the files or crashes.
    """
    arguments: dict[str, Any] = {"prompts": as_lists(prompts)}
    arguments |= {"max_tokens": max_tokens, **_adapter(adapter)}
    found = _call("generate", file, progress, **arguments)
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
    """Time prompts of random tokens in genai, with a cache for `context` tokens.

    After each prompt `generated` tokens are timed, or as many as still fit; a prompt that leaves no
    room for 2 is left out. Memory is what graph and context say, see onnxruntime_memory.

    Raises:
        ValidationFailed: genai refuses the files or crashes.
    """
    arguments: dict[str, Any] = {"context": context, "prompt_lengths": list(prompt_lengths)}
    arguments |= {"generated": max(2, generated), **_adapter(adapter)}
    return _measurements(_call("measure", file, progress, **arguments))


def scores(
    file: Path,
    texts: Sequence[Sequence[int]],
    *,
    exact: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """The score of each text of ids by a reward model, each text alone.

    Args:
        exact: with float32 products in place of int8 activations.

    Raises:
        BadInput: an empty text.
        ValidationFailed: ONNX Runtime refuses the files, or hands work to another provider.
    """
    arguments = {"texts": as_lists(texts), "exact": exact, "threads": worker.threads()}
    found: list[float] = _call("scores", file, progress, **arguments)
    return found


def measure_scores(
    file: Path,
    context: int,
    lengths: Sequence[int] = (200, 400, 600, 800, 1000),
    *,
    progress: Progress | None = None,
) -> Measurements:
    """Time the scoring of random texts, each alone; memory is for a text of `context` tokens."""
    arguments = {"context": context, "lengths": list(lengths), "threads": worker.threads()}
    return _measurements(_call("measure_scores", file, progress, **arguments))


def _measurements(found: dict[str, Any]) -> Measurements:
    return Measurements(
        speed=tuple(Speed(**speed) for speed in found["speed"]),
        memory=Memory(**found["memory"]),
        rss_anon=found["rss_anon"],
        rss_file=found["rss_file"],
    )


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """ONNX Runtime copies the same weights for every CPU: what was said for this one."""
    return measured


def _adapter(adapter: Path | None) -> dict[str, Any]:
    return {"adapter": None if adapter is None else str(adapter)}


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    refuse_missing(file, "ONNX Runtime runs a model.onnx or a model.ort")
    return worker.call(_WORKER, job, {"file": str(file), **arguments}, progress)
