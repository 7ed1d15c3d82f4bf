"""One artifact, judged in its own runtime: three errors apart, conformance, speed and memory.

full precision > codes (quantization) > file (read-back, in the container) > runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ValidationFailed
from ..quantize.windows import Windows, windows_of
from ..tokenizer.tokenizer import Tokenizer
from . import budget, conformance, divergence, logits
from .conformance import Conformance
from .divergence import Divergence
from .runtime import Effort, Generation, Ids, Measurements, Runtime
from .runtimes import reference
from .runtimes.reference import Oracle

Progress = Callable[[str, int, int], None]
GOLDEN_TOKENS = 96
SHORT = 64  # tokens: products in float32 are slow
HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Case:
    """What is judged, against what, on what.

    Attributes:
        file: the artifact.
        adapter: its separate adapter file, applied at run time with scale 1; None if merged.
        oracle: base + adapter in full precision.
        codes: the same decoder with the dequantized codes.
        texts: HELD_OUT and maybe "out_of_distribution", as windows.
        kv_cache, context, prompt_lengths: as the target says.
        prompts: {what it is: ids}, for golden.json and the samples in the report.
        beside: what else ships and is only proven: an adapter's file, or None for the base alone,
            and the codes with it.
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
    beside: Sequence[tuple[Path | None, Oracle]] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found.

    Attributes:
        accuracy: oracle against artifact, by text.
        quantization, runtime: the parts of the held-out divergence, oracle > codes > artifact.
        graph: codes > artifact without what its runtime rounds for speed; None where it cannot.
        golden: greedy tokens of the artifact, by prompt.
        expected: greedy tokens of the oracle, by prompt.
    """

    accuracy: dict[str, Divergence]
    quantization: Divergence
    runtime: Divergence
    graph: Divergence | None
    conformance: Conformance
    measurements: Measurements
    golden: dict[str, Generation]
    expected: dict[str, Generation]

    def to_json(self, codes_equal: bool) -> dict[str, Any]:
        """Its part of report.json; `codes_equal`: whether the file holds the very codes."""
        accuracy = {name: found.to_json() for name, found in self.accuracy.items()}
        for table in accuracy.values():
            table["ppl_ratio"] = budget.ratio(table)
        return {
            "accuracy": accuracy,
            "errors": {
                "quantization": {"kl_mean": self.quantization.kl_mean},
                "file": {"codes_equal": codes_equal},
                **({"graph": {"kl_max": self.graph.kl_max}} if self.graph else {}),
                "runtime": {"kl_mean": self.runtime.kl_mean},
            },
            "tokenizer": self.conformance.to_json(),
        }


def judge(case: Case, runtime: Runtime, work: Path, progress: Progress) -> Judgement:
    """Run oracle, codes and artifact over the same windows and compare them.

    Logits go through `work` on disk, one text at a time: 4 bytes x vocabulary per token, thrice.

    Raises:
        ValidationFailed: the runtime refuses the file, its tokenizer does not conform, or logits
            are not finite.
    """
    conforms = conformance.check(case.tokenizer, case.file, runtime)
    effort = runtime.effort(case.file)
    errors = {text: _errors(case, text, runtime, work, progress) for text in case.texts}
    _prove_others(case, runtime, work)
    prompts = list(case.prompts.values())
    count = min(GOLDEN_TOKENS, case.context - max(map(len, prompts)))
    if effort is not None:
        count = min(count, effort.generated)
    golden = runtime.generate(
        case.file,
        prompts,
        count,
        kv_cache=case.kv_cache,
        adapter=case.adapter,
        progress=stage(progress, "greedy answers", "prompts"),
    )
    expected = reference.generate(case.oracle, prompts, count, eos_ids=case.tokenizer.eos_ids)
    return Judgement(
        accuracy={text: found.whole for text, found in errors.items()},
        quantization=errors[HELD_OUT].quantization,
        runtime=errors[HELD_OUT].runtime,
        graph=errors[HELD_OUT].graph,
        conformance=conforms,
        measurements=runtime.measure(
            case.file,
            case.context,
            case.prompt_lengths,
            kv_cache=case.kv_cache,
            adapter=case.adapter,
            progress=stage(progress, "speed", "by prompt length"),
        ),
        golden=dict(zip(case.prompts, golden, strict=True)),
        expected=dict(zip(case.prompts, expected, strict=True)),
    )


def fitted(windows: Windows, effort: Effort | None) -> Windows:
    """As much of a text as a runtime can judge: fewer windows, evenly spread, or shorter ones."""
    if effort is None:
        return windows
    count, length = windows.ids.shape
    length = min(length, effort.length, max(SHORT, effort.tokens // 2))
    kept = min(count, max(1, effort.tokens // length))
    places = np.linspace(0, count - 1, kept).astype(np.int64)
    found = windows_of(np.ascontiguousarray(windows.ids[places, :length]))
    return windows if found.digest == windows.digest else found


@dataclass(frozen=True, slots=True)
class _Errors:
    """Oracle against artifact, and its two parts: oracle against codes, codes against artifact.

    `graph`: codes against what the artifact means, see Judgement.
    """

    whole: Divergence
    quantization: Divergence
    runtime: Divergence
    graph: Divergence | None


def _errors(case: Case, text: str, runtime: Runtime, work: Path, progress: Progress) -> _Errors:
    windows = case.texts[text].ids
    oracle, codes, artifact = (work / f"{name}.npy" for name in ("oracle", "codes", "artifact"))
    for model, path in ((case.oracle, oracle), (case.codes, codes)):
        reference.logits(model, windows, path, progress=stage(progress, path.stem, text))
    runtime.logits(
        case.file,
        windows,
        artifact,
        kv_cache=case.kv_cache,
        adapter=case.adapter,
        progress=stage(progress, artifact.stem, text),
    )
    found = _Errors(
        divergence.compare(oracle, artifact, windows),
        divergence.compare(oracle, codes, windows),
        divergence.compare(codes, artifact, windows),
        _graph(case, windows, codes, runtime, work) if text == HELD_OUT else None,
    )
    for path in (oracle, codes, artifact):
        path.unlink()
    return found


def _graph(
    case: Case, windows: Ids, codes: Path, runtime: Runtime, work: Path
) -> Divergence | None:
    """Whether the artifact means the very model that its codes are, on the start of one window.

    Raises:
        ValidationFailed: it means another one, however its runtime rounds.
    """
    start, expected = windows[:1, :SHORT], work / "expected.npy"
    np.save(expected, logits.read(codes)[:1, :SHORT])
    return _proven(case.file, case.adapter, start, expected, runtime, work)


def _prove_others(case: Case, runtime: Runtime, work: Path) -> None:
    """As `_graph`, for all else that ships: the base alone, and further adapters."""
    start, expected = case.texts[HELD_OUT].ids[:1, :SHORT], work / "expected.npy"
    for adapter, codes in case.beside:
        reference.logits(codes, start, expected)
        _proven(case.file, adapter, start, expected, runtime, work)


def _proven(
    file: Path, adapter: Path | None, start: Ids, expected: Path, runtime: Runtime, work: Path
) -> Divergence | None:
    """The exact logits of an artifact beside those of its codes, which are in `expected`."""
    meant = work / "meant.npy"
    noise = runtime.exact_logits(file, start, meant, adapter=adapter)
    if noise is None:
        return None
    found = divergence.compare(expected, meant, start)
    for path in (meant, expected):
        path.unlink()
    if found.kl_max > noise:
        name = file.name if adapter is None else f"{file.name} with {adapter.name}"
        raise ValidationFailed(
            f"{name} computes another model than the one that was quantized",
            f"its exact logits diverge by up to {found.kl_max:.3g} nats from those of its codes",
            "report it with the model's config.json; --container gguf may hold this model",
        )
    return found


def stage(progress: Progress, what: str, text: str) -> Callable[[int, int], None]:
    """Progress of one part of the work, named for people."""
    name = f"judging: {what}, {text.replace('_', ' ')}"
    return lambda done, total: progress(name, done, total)


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
