"""What validation asks of a runtime, and the values that it answers with.

A runtime is a module (runtimes.llamacpp, ...): it executes a file that slimport made the way a
device will, in a child process of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..targets.limits import Finding
from ..tokenizer.conformance import Chat
from .worker import Progress

Ids = npt.NDArray[np.int32]
# Nats at any token. The noise of float32 was at most 2e-10 in any family on tiny models, and grows
# with the square of that of logits; a graph that is wrong is off by far more.
SAME_MODEL = 1e-6


@dataclass(frozen=True, slots=True)
class Speed:
    """One prompt, timed on this machine.

    Attributes:
        prompt_tokens: length of the prompt.
        ttft_s: seconds until the first token is chosen.
        prompt_tps: prompt tokens per second.
        generation_tps: generated tokens per second after the first; None for a reward model, whose
            answer is its score.
        total_s: seconds for prompt and generation.
    """

    prompt_tokens: int
    ttft_s: float
    prompt_tps: float
    generation_tps: float | None
    total_s: float

    @classmethod
    def of(cls, prompt: int, generated: int, start: float, first: float, end: float) -> Speed:
        """From the tokens of a prompt and of its answer, and seconds on one clock.

        `first` is when the answer's first token was chosen.
        """
        return cls(
            prompt_tokens=prompt,
            ttft_s=first - start,
            prompt_tps=prompt / (first - start),
            generation_tps=(generated - 1) / (end - first),
            total_s=end - start,
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a loaded model.

    Attributes:
        mapped: weights in the mapped file, those that are also repacked too (file-backed).
        repacked: weights copied into another layout for this CPU (anonymous).
        kv_cache: keys and values at the full context (anonymous).
        compute: activations and logits (anonymous).
        adapter: a separate adapter's weights, copied from its file (anonymous).
    """

    mapped: int
    repacked: int
    kv_cache: int
    compute: int
    adapter: int = 0

    @property
    def anonymous(self) -> int:
        """Bytes that a system cannot evict, only swap."""
        return self.repacked + self.kv_cache + self.compute + self.adapter

    @property
    def total(self) -> int:
        return self.mapped + self.anonymous

    def to_json(self) -> dict[str, Any]:
        """By name; without `adapter` where there is none."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return parts if self.adapter else {k: v for k, v in parts.items() if k != "adapter"}


@dataclass(frozen=True, slots=True)
class Measurements:
    """Of this machine only: never in a digest, never a gate for a phone.

    Attributes:
        speed: one entry per prompt length that fits into the context.
        memory: as the runtime states it.
        rss_anon, rss_file: bytes that the process gained from opening the model to the end of the
            last prompt; None where the system does not tell them apart.
    """

    speed: tuple[Speed, ...]
    memory: Memory
    rss_anon: int | None
    rss_file: int | None


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy tokens after a prompt, without the token that ended them.

    Attributes:
        tokens: the generated ids.
        stopped: whether an end-of-generation token came before `max_tokens`.
    """

    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a runtime made of a file's tokenizer.

    Attributes:
        size: tokens.
        eog: every id at which the runtime stops generating.
        bos: the id of the begin-of-sequence token, or None.
        adds_bos: whether the runtime puts it before a text by itself; None: it never does, and
            the app has to.
        chat_template: the template in the file, or None.
    """

    size: int
    eog: tuple[int, ...]
    bos: int | None
    adds_bos: bool | None
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class Effort:
    """How much can be asked of a slow runtime.

    Attributes:
        length: tokens of one window, at most.
        tokens: of all windows of a text, at most.
        generated: tokens after a prompt, at most.
    """

    length: int
    tokens: int
    generated: int


@dataclass(frozen=True, slots=True)
class Accelerator:
    """How much of a model an NPU or a GPU runs, as shares: the rest falls to the CPU.

    `findings`: why something does, or may.
    """

    nodes: float
    weight_bytes: float
    kind: Literal["npu", "gpu"]
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, float]:
        """By the names of the metrics, such as `npu_nodes`."""
        return {
            f"{self.kind}_nodes": self.nodes,
            f"{self.kind}_weight_bytes": self.weight_bytes,
        }


def as_lists(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as JSON takes them.

    Raises:
        BadInput: there are none, or one is empty.
    """
    if not prompts or not all(map(len, prompts)):
        raise BadInput(
            "an empty prompt cannot be continued",
            "greedy generation needs at least one token id",
            "give prompts of at least one token",
        )
    return [list(map(int, prompt)) for prompt in prompts]


def refuse_empty(windows: Ids) -> None:
    """Raise BadInput if there is no window to run."""
    if windows.ndim != 2 or not windows.size:
        raise BadInput(
            f"windows of shape {windows.shape} cannot be run",
            "validation needs at least one window of token ids, int32 (n, length)",
            "give a longer text",
        )


def refuse_missing(file: Path, what: str) -> None:
    """Raise BadInput without the file; `what` a runtime runs, as a sentence."""
    if not file.is_file():
        raise BadInput(f"there is no file {file.name}", what, "export the model first")


class Reader(Protocol):
    """The part of a runtime that reads a file's tokenizer, in a child process."""

    def tokenize(self, file: Path, texts: Sequence[str]) -> list[list[int]]:
        """Ids as the runtime's own tokenizer sees each text; special tokens in it are parsed."""

    def vocabulary(self, file: Path) -> Vocabulary:
        """What the runtime read of the tokenizer: where it stops, what it adds."""

    def render(self, file: Path, chats: Sequence[Chat]) -> list[str | None] | None:
        """Each conversation by the template in the file; None for one that is refused.

        None in all: this runtime does not render, and has the template in `vocabulary`.
        """


class Scorer(Reader, Protocol):
    """Executes the reward models of a container; every function opens the file in a child."""

    def scores(
        self,
        file: Path,
        texts: Sequence[Sequence[int]],
        *,
        exact: bool = False,
        progress: Progress | None = None,
    ) -> list[float]:
        """The score of each text; `exact`: without what the runtime rounds for speed."""

    def measure_scores(
        self,
        file: Path,
        context: int,
        lengths: Sequence[int],
        *,
        progress: Progress | None = None,
    ) -> Measurements:
        """Speed and memory at a context length, on this machine."""


class Runtime(Reader, Protocol):
    """Executes a container; every function opens the file in a child process."""

    @property
    def EXECUTES(self) -> bool:
        """Whether a device's runtime runs the file; False: a model of its program is judged."""

    @property
    def PREDICTED(self) -> tuple[str, ...]:
        """The parts of Memory that `memory_on` predicts; the others are as measured here."""

    @property
    def UNKNOWN(self) -> tuple[str, ...]:
        """In words, what this runtime cannot say of a device."""

    @property
    def SESSION(self) -> Mapping[str, Any]:
        """Settings of `logits` that may change bits, as they stand in manifests; may be empty."""

    def effort(self, file: Path) -> Effort | None:
        """How much can be asked of it; None: all that a recipe asks for."""

    def accelerator(self, file: Path) -> Accelerator | None:
        """How much of the model the device's NPU or GPU runs; None: it is for the CPU."""

    def version(self) -> str:
        """The runtime's name and version, as it stands in reports."""

    def logits(
        self,
        file: Path,
        windows: Ids,
        out: Path,
        *,
        kv_cache: str = "f16",
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write float32 logits (n, length, vocabulary) of windows (n, length) as a .npy file."""

    def exact_logits(
        self,
        file: Path,
        windows: Ids,
        out: Path,
        *,
        adapter: Path | None = None,
    ) -> float | None:
        """As `logits`, without what the runtime rounds for speed: what the file means.

        Returns the KL at any token, in nats, that noise can make of it, such as SAME_MODEL; more is
        another model. None: this runtime cannot; nothing is written.
        """

    def generate(
        self,
        file: Path,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        kv_cache: str = "f16",
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Greedy continuation of each prompt."""

    def measure(
        self,
        file: Path,
        context: int,
        prompt_lengths: Sequence[int],
        *,
        kv_cache: str = "f16",
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> Measurements:
        """Speed and memory at a context length, on this machine."""

    def memory_on(self, file: Path, isa: Collection[str], measured: Memory) -> Memory:
        """The memory that was measured here, with PREDICTED as they will be on another CPU."""
