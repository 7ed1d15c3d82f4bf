"""One artifact, judged in its own runtime: three errors apart, conformance, speed and memory.

full precision > codes (quantization) > file (read-back, in the container) > runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantize.windows import Windows
from ..tokenizer import Tokenizer
from . import conformance, divergence
from .conformance import Conformance
from .divergence import Divergence
from .runtime import Generation, Measurements, Runtime
from .runtimes import reference
from .runtimes.reference import Oracle

Progress = Callable[[str, int, int], None]
GOLDEN_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Case:
    """What is judged, against what, on what.

    Attributes:
        file: the artifact.
        adapter: its separate adapter file, applied at run time with scale 1; None if merged.
        oracle: base + adapter in full precision.
        codes: the same decoder with the dequantized codes.
        texts: "held_out" and maybe "out_of_distribution", as windows.
        kv_cache, context, prompt_lengths: as the target says.
        prompts: {what it is: ids}, for golden.json and the samples in the report.
    """

    file: Path
    adapter: Path | None
    oracle: Oracle
    codes: Oracle
    tokenizer: Tokenizer
    texts: Mapping[str, Windows]
    kv_cache: str
    context: int
    prompt_lengths: Sequence[int]
    prompts: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found.

    Attributes:
        accuracy: oracle against artifact, by text.
        quantization, runtime: the parts of the held-out divergence, oracle > codes > artifact.
        golden: greedy tokens of the artifact, by prompt.
        expected: greedy tokens of the oracle, by prompt.
    """

    accuracy: dict[str, Divergence]
    quantization: Divergence
    runtime: Divergence
    conformance: Conformance
    measurements: Measurements
    golden: dict[str, Generation]
    expected: dict[str, Generation]


def judge(case: Case, runtime: Runtime, work: Path, progress: Progress) -> Judgement:
    """Run oracle, codes and artifact over the same windows and compare them.

    Logits go through `work` on disk, one text at a time: 4 bytes x vocabulary per token, thrice.

    Raises:
        ValidationFailed: the runtime refuses the file, its tokenizer does not conform, or logits
            are not finite.
    """
    found = conformance.check(case.tokenizer, case.file, runtime)
    accuracy: dict[str, Divergence] = {}
    parts: tuple[Divergence, Divergence] | None = None
    for text, windows in case.texts.items():
        oracle, artifact = work / "oracle.npy", work / "artifact.npy"
        reference.logits(
            case.oracle, windows.ids, oracle, progress=_stage(progress, "oracle", text)
        )
        runtime.logits(
            case.file,
            windows.ids,
            artifact,
            kv_cache=case.kv_cache,
            adapter=case.adapter,
            progress=_stage(progress, "artifact", text),
        )
        accuracy[text] = divergence.compare(oracle, artifact, windows.ids)
        if parts is None:
            codes = work / "codes.npy"
            reference.logits(
                case.codes, windows.ids, codes, progress=_stage(progress, "codes", text)
            )
            quantization = divergence.compare(oracle, codes, windows.ids)
            parts = quantization, divergence.compare(codes, artifact, windows.ids)
            codes.unlink()
        oracle.unlink()
        artifact.unlink()
    assert parts is not None, "a case has at least one text"
    prompts = list(case.prompts.values())
    golden = runtime.generate(
        case.file, prompts, GOLDEN_TOKENS, kv_cache=case.kv_cache, adapter=case.adapter
    )
    expected = reference.generate(
        case.oracle, prompts, GOLDEN_TOKENS, eos_ids=case.tokenizer.eos_ids
    )
    return Judgement(
        accuracy=accuracy,
        quantization=parts[0],
        runtime=parts[1],
        conformance=found,
        measurements=runtime.measure(
            case.file,
            case.context,
            case.prompt_lengths,
            kv_cache=case.kv_cache,
            adapter=case.adapter,
            progress=_stage(progress, "speed", "by prompt length"),
        ),
        golden=dict(zip(case.prompts, golden, strict=True)),
        expected=dict(zip(case.prompts, expected, strict=True)),
    )


def _stage(progress: Progress, what: str, text: str) -> Callable[[int, int], None]:
    stage = f"judging: {what}, {text.replace('_', ' ')}"
    return lambda done, total: progress(stage, done, total)


def golden_json(judgement: Judgement, case: Case) -> dict[str, Any]:
    """Prompts, their ids and the greedy tokens that follow in the runtime, to prove a device."""
    return {
        "schema": "slimport.golden/1",
        "kv_cache": case.kv_cache,
        "adapter": case.adapter and case.adapter.name,
        "prompts": [
            {
                "text": text,
                "ids": list(case.prompts[text]),
                "greedy": list(generation.tokens),
                "stopped": generation.stopped,
            }
            for text, generation in judgement.golden.items()
        ],
    }
