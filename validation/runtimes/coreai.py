"""An .aimodel, executed by Apple's own runtime for Linux: the shipped file, on this CPU.

Fills `validation.runtime.Runtime` for the container coreai. Everything happens in a child process
(`coreai_worker`), which a damaged file would end. The runtime dequantizes all weights in every run,
in a slow loop: `effort` says how much can be asked of it, and its speed is not reported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import BadInput
from ...export.coreai import sdk
from .. import worker
from ..runtime import (
    SAME_MODEL,
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

EXECUTES = True  # Apple's runtime ran the shipped file; UNKNOWN says where it did not
PREDICTED = ("mapped", "repacked", "kv_cache", "compute")  # computed from the file
UNKNOWN = (
    "Core AI: Apple's runtime executed the file on a Linux CPU; no iPhone and no Mac did",
    "iOS 27, a beta: whether it takes the file, on which unit it runs, and how fast",
    "memory: what Core AI copies or dequantizes when it loads on a device",
)
SESSION: Mapping[str, Any] = {}
DECODED = 2  # tokens of the first window that are given one by one
_WORKER = "slimport.validation.runtimes.coreai_worker"
# CPU-seconds of a run and of each token in it, for a million bytes of weights: measured with models
# of 3.5 and 135 million weights. And how long one text and one answer may take.
_RUN_SECONDS, _TOKEN_SECONDS = 0.13, 0.00045
_TEXT_SECONDS, _ANSWER_SECONDS = 120.0, 20.0
_LONGEST, _FLOAT = 512, 4


def version() -> str:
    """Such as "Apple's Core AI runtime for Linux in coreai-core 1.0.0b3"."""
    return f"Apple's Core AI runtime for Linux in {sdk.CORE} {sdk.VERSIONS[sdk.CORE]}"


def effort(file: Path) -> Effort:
    """What the runtime computes in some minutes, from the size of the model."""
    million = file.stat().st_size / 1e6
    length = min(int(told(file)["slimport.context_length"]), _LONGEST)
    step = million * (_RUN_SECONDS + _TOKEN_SECONDS)
    window = million * (_RUN_SECONDS + _TOKEN_SECONDS * length)
    windows = max(1, int((_TEXT_SECONDS - DECODED * step) / window))
    return Effort(
        length=length,
        tokens=windows * length,
        generated=max(2, int((_ANSWER_SECONDS - window) / step)),
    )


def accelerator(file: Path) -> None:
    """Where Core AI runs an operation is only known on a device."""


def logits(
    file: Path,
    windows: Ids,
    out: Path,
    *,
    kv_cache: str = "f32",
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Logits at every position of every window, each window from empty states.

    The last tokens of the first window are given one by one, all others at once.

    Args:
        file: the program of the .aimodel.
        windows: int32 (n, length) token ids, as they are: nothing is put before them.
        out: becomes a .npy file of float32 (n, length, vocabulary).

    Raises:
        BadInput: no windows, no such file or a damaged one, or windows longer than its context.
        DependencyMissing: the runtime is not installed.
        ValidationFailed: it refuses the file or crashes.
    """
    refuse_empty(windows)
    _call("logits", file, progress, windows=windows.tolist(), out=str(out))


def exact_logits(file: Path, windows: Ids, out: Path, *, adapter: Path | None = None) -> float:
    """As `logits`: float32 is all that the program rounds to."""
    logits(file, windows, out)
    return SAME_MODEL


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids by the tokenizers library from the shipped tokenizer.json: what an app must give."""
    return shipped_tokenizer.tokenize(file.parents[1], texts)


def vocabulary(file: Path) -> Vocabulary:
    """What the file and those beside it say to an app."""
    return shipped_tokenizer.vocabulary(file.parents[1], told(file))


def render(file: Path, chats: Sequence[Any]) -> None:
    """The app renders: Core AI does not."""


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
        BadInput: an empty prompt, or one longer than the context; a damaged file.
        DependencyMissing, ValidationFailed: as `logits`.
    """
    given = {"prompts": as_lists(prompts), "max_tokens": max_tokens}
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
    """Memory from the sizes of the file; no speed, because that of Linux says nothing."""
    memory = _memory(file, context)
    return Measurements(speed=(), memory=memory, rss_anon=None, rss_file=None)


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """It does not depend on the phone's CPU."""
    return measured


def told(file: Path) -> Mapping[str, str]:
    """What slimport says in the file's metadata.

    Raises:
        BadInput: it does not.
    """
    found = read_json(file.parent / "metadata.json").get("creatorDefinedMetadata")
    wanted = ("context_length", "heads", "states", "vocab_size", "stop_tokens")
    if not isinstance(found, dict) or not {f"slimport.{key}" for key in wanted} <= found.keys():
        raise BadInput(
            "metadata.json does not say what slimport writes",
            "context, vocabulary and stop tokens stand there",
            "export the model again",
        )
    return found


def _memory(file: Path, context: int) -> Memory:
    """The file, mapped and copied for the GPU as it is; states; logits and scores of a run.

    What a device dequantizes beforehand is not known. On Linux all weights are float32 in a run.
    """
    notes = {key: int(told(file)[f"slimport.{key}"]) for key in ("heads", "vocab_size", "states")}
    size = file.stat().st_size
    part = min(context, _LONGEST)
    width = notes["vocab_size"] + 2 * notes["heads"] * context
    return Memory(
        mapped=size,
        repacked=size,
        kv_cache=_FLOAT * notes["states"] * context,
        compute=_FLOAT * part * width,
    )


def _call(job: str, file: Path, progress: Progress | None = None, **arguments: Any) -> Any:
    sdk.require()
    refuse_missing(file, "Core AI runs the program of an .aimodel")
    return worker.call(_WORKER, job, {"file": str(file), **arguments}, progress)
