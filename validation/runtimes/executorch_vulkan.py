"""A program of a phone's GPU, judged by an eager model that reads it: nothing executes it here.

Fills `validation.runtime.Runtime` for the container executorch-vulkan. Logits and greedy tokens are
those of the shipped file's own program, operator by operator in float32 on this CPU; ids come from
the C++ tokenizer of ExecuTorch's runner. It proves what the program means, and not that a driver
computes it: reports say that the file was not executed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version as distribution
from pathlib import Path
from typing import Any

from ...export.executorch.decoder import FORWARD
from ...export.executorch_vulkan.schema import VULKAN
from .. import worker
from ..runtime import (
    SAME_MODEL,
    Accelerator,
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
from .executorch import render, tokenize
from .executorch_program import Program, malformed

__all__ = [
    "EXECUTES",
    "PREDICTED",
    "SESSION",
    "UNKNOWN",
    "accelerator",
    "effort",
    "exact_logits",
    "generate",
    "logits",
    "measure",
    "memory_on",
    "render",
    "tokenize",
    "version",
    "vocabulary",
]

EXECUTES = False
PREDICTED = ("mapped", "repacked", "kv_cache", "compute")  # computed from the program
UNKNOWN = (
    "Vulkan: structure checked, not executed; an eager model of the same program was judged",
    "GPU: speed, rounding inside of its shaders, and what its driver cannot hold",
)
SESSION: Mapping[str, Any] = {}
_WORKER = "slimport.validation.runtimes.executorch_vulkan_worker"
_BACKEND = "VulkanBackend"
_FLOAT = 4
# What the loop over a prompt does with integers, and the embedding, of which a token reads one row.
_BESIDE = frozenset(
    """aten::sym_size executorch_prim::add executorch_prim::ge aten::slice_copy aten::add
    aten::embedding aten::_to_copy quantized_decomposed::embedding_byte
    quantized_decomposed::embedding_4bit quantized_decomposed::embedding_2bit""".split()
)


def effort(file: Path) -> None:
    """It is as fast as the reference."""


def accelerator(file: Path) -> Accelerator:
    """How much of what is computed with activations is handed to the GPU.

    Operators, and bytes of the weights that they read. The row of the embedding that a token looks
    up on the CPU is not counted, as it is not for an NPU.
    """
    program = Program.open(file)
    method = program.method(FORWARD)
    on_gpu, gpu_bytes = 0, 0
    for delegate, segment in zip(method["delegates"], program.graphs(method), strict=True):
        if delegate["id"] != _BACKEND:
            raise malformed(f"it has a delegate of {delegate['id']}")
        graph, _ = program.graph(segment, VULKAN)
        on_gpu += len(graph["chain"])
        gpu_bytes += sum(constant["length"] for constant in graph["constants"])
    operators = [operator["name"] for operator in method["operators"]]
    on_cpu = [
        call["args"]
        for chain in method["chains"]
        for kind, call in (each["instr_args"] for each in chain["instructions"])
        if kind == "KernelCall" and operators[call.get("op_index", 0)] not in _BESIDE
    ]
    values = [method["values"][index]["val"] for args in on_cpu for index in args]
    cpu_bytes = sum(
        _FLOAT * math.prod(fields["sizes"])
        for kind, fields in values
        if kind == "Tensor" and fields.get("data_buffer_idx", 0)
    )
    shares = on_gpu / (on_gpu + len(on_cpu)), gpu_bytes / (gpu_bytes + cpu_bytes)
    return Accelerator(*shares, "gpu")


def version() -> str:
    """Such as "an eager interpreter of the Vulkan program with torch 2.8.0 ..."."""
    return (
        f"an eager interpreter of the Vulkan program with torch {distribution('torch')} and"
        f" pytorch-tokenizers {distribution('pytorch-tokenizers')}"
    )


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from an empty cache.

    The last tokens of the first window go through the whole program, one by one; for all others the
    operator that takes the last token out of a chunk is left out.

    Args:
        file: `model.pte`.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).

    Raises:
        BadInput: no windows, no such file, or windows longer than the program's context.
        ValidationFailed: the program has instructions or operators that are not known.
        EnvironmentFailed: the disk is full.
    """
    refuse_empty(windows)
    given = {"windows": windows.tolist(), "out": str(out), "threads": worker.threads()}
    _call("logits", file, progress, **given)


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """The same: nothing is rounded for speed."""
    logits(file, windows, out)
    return SAME_MODEL


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
        BadInput: an empty prompt, or one longer than the program's context.
        ValidationFailed: as `logits`.
    """
    given = {"prompts": as_lists(prompts), "max_tokens": max_tokens, "threads": worker.threads()}
    found = _call("generate", file, progress, **given)
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def measure(
    file: Path,
    context: int,
    prompt_lengths: Sequence[int] = (),
    *,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Memory as the program says; no speed, because an eager model's says nothing."""
    memory = Memory(**_call("memory", file, progress))
    return Measurements(speed=(), memory=memory, rss_anon=None, rss_file=None)


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """It does not depend on the phone's CPU."""
    return measured


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    refuse_missing(file, "a GPU's program is a model.pte")
    given = {"file": str(file), "folder": str(file.parent), **arguments}
    return worker.call(_WORKER, job, given, progress)
