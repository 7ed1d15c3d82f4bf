"""llama.cpp as it runs on a device: same file, same kernels, same KV cache.

Fills `validation.runtime.Runtime` for GGUF files. Everything happens in a child process
(`llamacpp_worker`), which imports neither torch nor transformers and starts in a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ValidationFailed
from ...quantize import ggml
from ...tokenizer.conformance import Chat
from .. import worker
from ..runtime import (
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
from . import llamacpp_memory

EXECUTES = True
PREDICTED = ("mapped", "repacked")
UNKNOWN: tuple[str, ...] = ()
SESSION: Mapping[str, Any] = {}
_WORKER = "slimport.validation.runtimes.llamacpp_worker"

version = ggml.version
memory_on = llamacpp_memory.memory_on


def effort(file: Path) -> None:
    """It is as fast as a recipe needs it."""


def accelerator(file: Path) -> None:
    """It runs on the CPU."""


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    scale: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from an empty cache.

    Args:
        file: a GGUF model.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).
        kv_cache: a ggml type. `f32` also turns flash attention off, for comparisons of the
            mathematics; anything else leaves it on automatic, as on a device.
        adapter: a GGUF adapter applied at run time, with `scale`.
        threads: CPU threads; all by default.

    Raises:
        BadInput: no windows, or no such file.
        ValidationFailed: llama.cpp refuses the file or crashes.
        EnvironmentFailed: the disk is full.
    """
    refuse_empty(windows)
    arguments = {"windows": windows.tolist(), "out": str(out), "kv_cache": kv_cache}
    _call("logits", file, progress, **arguments, **_adapter(adapter, scale), **_threads(threads))


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> None:
    """llama.cpp's kernels round activations, and no setting changes it."""


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text by llama.cpp's tokenizer: no special tokens added, those in it parsed."""
    found: list[list[int]] = _call("tokenize", file, texts=list(texts))
    return found


def vocabulary(file: Path) -> Vocabulary:
    """What llama.cpp read of the tokenizer: where it stops, what it adds."""
    found = _call("vocabulary", file)
    return Vocabulary(**{**found, "eog": tuple(found["eog"])})


def render(file: Path, chats: Sequence[Chat]) -> None:
    """What renders is no part of llama.cpp's library, but of the programs around it."""


def generate(
    file: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    scale: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy tokens after each prompt of ids, up to an end-of-generation token.

    Raises:
        BadInput: an empty prompt.
        ValidationFailed: llama.cpp refuses the file or crashes.
    """
    arguments: dict[str, Any] = {"prompts": as_lists(prompts)}
    arguments |= {"max_tokens": max_tokens, "kv_cache": kv_cache}
    arguments |= _adapter(adapter, scale) | _threads(threads)
    found = _call("generate", file, progress, **arguments)
    return [Generation(tuple(tokens), stopped) for tokens, stopped in found]


def measure(
    file: Path,
    context: int,
    prompt_lengths: Sequence[int] = (200, 400, 600, 800, 1000),
    *,
    generated: int = 64,
    kv_cache: str = "f16",
    adapter: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Time prompts of random tokens and read memory, with a context of `context` tokens.

    After each prompt `generated` tokens are timed, or as many as still fit; a prompt that leaves no
    room for 2 is left out. Memory is what llama.cpp logs, to 0.01 MiB.

    Raises:
        ValidationFailed: llama.cpp refuses the file, crashes, or logs no buffer sizes.
    """
    arguments: dict[str, Any] = {"context": context, "prompt_lengths": list(prompt_lengths)}
    arguments |= {"generated": max(2, generated), "kv_cache": kv_cache}
    arguments |= _adapter(adapter, 1.0) | _threads(threads)
    found = _call("measure", file, progress, **arguments)
    return Measurements(
        speed=tuple(Speed(**speed) for speed in found["speed"]),
        memory=_memory(found["buffers"]),
        rss_anon=found["rss_anon"],
        rss_file=found["rss_file"],
    )


def _memory(buffers: dict[str, int]) -> Memory:
    def total(*endings: str) -> int:
        return sum(size for name, size in buffers.items() if name.endswith(endings))

    memory = Memory(
        mapped=total("CPU_Mapped model"),
        repacked=total("CPU_REPACK model"),
        kv_cache=total("KV"),
        compute=total("compute", "output"),
        adapter=total("LoRA"),
    )
    if not (memory.mapped and memory.kv_cache and memory.compute):
        raise ValidationFailed(
            "llama.cpp's memory cannot be read from its log",
            f"it names the buffers {', '.join(sorted(buffers)) or 'none'}",
            "report this: the log of this llama.cpp is not the one slimport reads",
        )
    return memory


def _adapter(adapter: Path | None, scale: float) -> dict[str, Any]:
    return {"adapter": None if adapter is None else str(adapter), "scale": scale}


def _threads(threads: int | None) -> dict[str, int]:
    return {"threads": worker.threads() if threads is None else threads}


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    ggml.library()  # a wrong release is said here, before a child is started
    refuse_missing(file, "llama.cpp runs a GGUF file")
    return worker.call(_WORKER, job, {"file": str(file), **arguments}, progress)
