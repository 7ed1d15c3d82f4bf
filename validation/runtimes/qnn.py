"""The Qualcomm NPU as its emulator computes it: the shipped context binaries, on x86.

Fills `validation.runtime.Runtime` for the QNN container. Everything happens in a child process
(`qnn_worker`). The emulator gives the NPU's numbers and not its speed: it is slow, so `effort` says
how much can be asked of it, and no speed is reported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version as distribution
from pathlib import Path
from typing import Any

import onnx

from ...checkpoint import read_json
from ...export.qnn import sdk
from ...export.qnn.compilation import binary_of
from ...export.qnn.delegation import Delegated, delegated
from ...tokenizer.conformance import Chat
from .. import worker
from ..runtime import (
    Accelerator,
    Effort,
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

EXECUTES = True
PREDICTED = ("mapped", "repacked", "kv_cache", "compute")  # the emulator's own say nothing
UNKNOWN = (
    "speed: the time of the NPU's emulator says nothing about a phone",
    "one context binary for both graphs, or for several chips: they cannot be loaded again here",
)
SESSION: Mapping[str, Any] = {}
_WORKER = "slimport.validation.runtimes.qnn_worker"
_GRAPHS = ("decode", "prefill")
# The emulator's seconds for a million weights by the bits of a code, and for a million scores, of a
# prompt's chunk and of one token: measured on one core with a model of 3.5 million.
_CHUNK_SECONDS, _STEP_SECONDS = {8: 0.25, 4: 0.65}, {8: 0.1, 4: 0.45}
_SCORES_SECONDS, _RUN_SECONDS = 0.4, 0.05
_TEXT_SECONDS, _ANSWER_SECONDS = 45.0, 20.0  # for one text, and for one answer
_INT16 = 2


def version() -> str:
    """Such as "the emulator of Qualcomm's NPU in onnxruntime-qnn 2.7.0 ..."."""
    return (
        f"the emulator of Qualcomm's NPU in {sdk.DISTRIBUTION} {sdk.VERSION} with ONNX Runtime"
        f" {distribution('onnxruntime')}"
    )


def effort(file: Path) -> Effort:
    """What the emulator computes in some minutes, from the size of the model."""
    sizes = read_json(file.parent / "qnn.json")
    millions = _multiplied(file.parent)
    scores = sizes["layers"] * sizes["heads"] * (sizes["context"] + sizes["chunk"]) / 1e6

    def seconds(tokens: int, each: Mapping[int, float]) -> float:
        linear: float = sum(each[bits] * count for bits, count in millions.items())
        return _RUN_SECONDS + linear + _SCORES_SECONDS * tokens * float(scores)

    chunks = max(2, int(_TEXT_SECONDS / seconds(sizes["chunk"], _CHUNK_SECONDS)))
    steps = max(4, int(_ANSWER_SECONDS / seconds(1, _STEP_SECONDS)))
    return Effort(length=sizes["context"], tokens=chunks * sizes["chunk"], generated=steps)


def accelerator(file: Path) -> Accelerator:
    """How much of both graphs the NPU holds, as the shipped context models show it."""
    found = [_delegated(file.parent, name) for name in _GRAPHS]
    nodes, npu_nodes, stored, npu_stored = (sum(column) for column in zip(*found, strict=True))
    return Accelerator(npu_nodes / nodes, npu_stored / stored, "npu")


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "i16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from an empty cache.

    The last tokens of the first window go through the graph of one token, all others through that
    of a prompt's chunk.

    Args:
        file: `decode.onnx`, the other files beside it.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).

    Raises:
        BadInput: no windows, or longer ones than the cache holds.
        DependencyMissing: the emulator is not installed.
        ValidationFailed: it refuses the files, or a binary is for another chip.
    """
    refuse_empty(windows)
    _call("logits", file, progress, windows=windows.tolist(), out=str(out))


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> None:
    """The NPU rounds activations to 16 bits, always."""


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids by the tokenizers library from the shipped tokenizer.json: what an app must use."""
    return shipped_tokenizer.tokenize(file.parent, texts)


def vocabulary(file: Path) -> Vocabulary:
    """What qnn.json and tokenizer.json say to an app."""
    tokens = read_json(file.parent / "qnn.json")["tokens"]
    return Vocabulary(
        size=shipped_tokenizer.library(file.parent).get_vocab_size(with_added_tokens=True),
        eog=tuple(tokens["ends"]),
        bos=tokens["bos"],
        adds_bos=tokens["adds_bos"],
        chat_template=tokens["chat_template"],
    )


def render(file: Path, chats: Sequence[Chat]) -> None:
    """The app renders: no runtime does."""


def generate(
    file: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    kv_cache: str = "i16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy tokens after each prompt of ids, up to an end-of-generation token.

    Raises:
        BadInput: an empty prompt.
        ValidationFailed: the emulator refuses the files or crashes.
    """
    given = {"prompts": as_lists(prompts), "max_tokens": max_tokens}
    found = _call("generate", file, progress, **given)
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def measure(
    file: Path,
    context: int,
    prompt_lengths: Sequence[int] = (),
    *,
    kv_cache: str = "i16",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Memory from the sizes of the files; no speed, because an emulator's says nothing."""
    return Measurements(
        speed=(), memory=_memory(file.parent, context), rss_anon=None, rss_file=None
    )


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """It does not depend on the phone's CPU."""
    return measured


def _memory(folder: Path, context: int) -> Memory:
    """Both binaries are copied to the NPU's memory; the table of the embedding stays mapped.

    The cache is held by the app and handed over in every run: once in, and as new keys and values
    out. Activations of a run: logits and hidden states of a chunk, and the masks.
    """
    sizes = read_json(folder / "qnn.json")
    binaries = sum((folder / binary_of(name)).stat().st_size for name in _GRAPHS)
    width = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"]
    chunk = sizes["chunk"]
    group = sizes["heads"] // sizes["kv_heads"]
    runs = chunk * (sizes["vocab_size"] + sizes["hidden_size"] + width)
    runs += group * chunk * (context + chunk)
    return Memory(
        mapped=(folder / "tables.data").stat().st_size,
        repacked=binaries,
        kv_cache=width * context * _INT16,
        compute=runs * _INT16,
    )


def _multiplied(folder: Path) -> dict[int, float]:
    """{bits: millions of weights} that one token is multiplied with."""
    graph = onnx.load_model(folder / "qdq" / "decode.onnx", load_external_data=False).graph
    kinds = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4}
    return {
        bits: sum(math.prod(t.dims) for t in graph.initializer if t.data_type == kind) / 1e6
        for bits, kind in kinds.items()
    }


def _delegated(folder: Path, name: str) -> Delegated:
    return delegated(folder / "qdq" / f"{name}.onnx", folder / f"{name}.onnx")


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    sdk.require()
    refuse_missing(file, "the emulator runs a decode.onnx with its context binary")
    return worker.call(_WORKER, job, {"file": str(file), **arguments}, progress)
