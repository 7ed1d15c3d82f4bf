"""A reward model's artifact, judged in its own runtime: scores of pairs, three errors apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ValidationFailed
from ..tokenizer.tokenizer import Tokenizer
from . import conformance, preference
from .conformance import Conformance
from .judge import HELD_OUT, SHORT, Progress, stage
from .preference import Agreement, Ids, Pairs
from .runtime import Measurements, Scorer
from .runtimes import reference
from .runtimes.reference import Oracle

_GOLDEN_PAIRS = 3
# Of a score, or of 1 where it is smaller. The noise of float32 products was at most 6e-6 on tiny
# random models of every family.
_SAME_SCORE = 1e-4


@dataclass(frozen=True, slots=True)
class RewardCase:
    """What is judged, against what, on what.

    Attributes:
        file: the artifact.
        oracle: the reward model in full precision.
        codes: the same with the dequantized codes.
        pairs: HELD_OUT and maybe "out_of_distribution".
        context, prompt_lengths: as the target says.
    """

    file: Path
    oracle: Oracle
    codes: Oracle
    tokenizer: Tokenizer
    pairs: Mapping[str, Pairs]
    context: int
    prompt_lengths: Sequence[int]


@dataclass(frozen=True, slots=True)
class RewardJudgement:
    """What was found.

    Attributes:
        preference: oracle against artifact, by text.
        quantization, runtime: the parts of the held-out difference, oracle > codes > artifact.
        graph: largest difference of scores, codes > artifact without what its runtime rounds for
            speed.
        golden: ids and score of the artifact.
    """

    preference: dict[str, Agreement]
    quantization: Agreement
    runtime: Agreement
    graph: float
    conformance: Conformance
    measurements: Measurements
    golden: list[tuple[Ids, float]]

    def to_json(self, codes_equal: bool) -> dict[str, Any]:
        """Its part of report.json; `codes_equal`: whether the file holds the very codes."""
        return {
            "kind": "reward",
            "accuracy": {},
            "preference": {name: found.to_json() for name, found in self.preference.items()},
            "errors": {
                "quantization": {"score_rmse": self.quantization.score_rmse},
                "file": {"codes_equal": codes_equal},
                "graph": {"score_max": self.graph},
                "runtime": {"score_rmse": self.runtime.score_rmse},
            },
            "tokenizer": self.conformance.to_json(),
        }

    def golden_json(self) -> dict[str, Any]:
        """Ids and the score that follows in the runtime, to prove a device."""
        return {
            "schema": "slimport.golden/1",
            "texts": [{"ids": list(ids), "score": score} for ids, score in self.golden],
        }


def judge_reward(case: RewardCase, scorer: Scorer, progress: Progress) -> RewardJudgement:
    """Score the same pairs with oracle, codes and artifact and compare them.

    Raises:
        ValidationFailed: the runtime refuses the file, its tokenizer does not conform, a score is
            not finite, or the file computes another model than the one that was quantized.
    """
    conforms = conformance.check(case.tokenizer, case.file, scorer)
    whole: dict[str, Agreement] = {}
    for name, pairs in case.pairs.items():
        texts = pairs.texts
        oracle, codes = (
            reference.scores(model, texts, progress=stage(progress, words, name))
            for model, words in ((case.oracle, "oracle"), (case.codes, "codes"))
        )
        artifact = scorer.scores(case.file, texts, progress=stage(progress, "artifact", name))
        whole[name] = preference.compare(oracle, artifact)
        if name == HELD_OUT:
            quantization = preference.compare(oracle, codes)
            runtime = preference.compare(codes, artifact)
            golden = list(zip(texts, artifact, strict=True))[: 2 * _GOLDEN_PAIRS]
    return RewardJudgement(
        preference=whole,
        quantization=quantization,
        runtime=runtime,
        graph=_graph(case, scorer),
        conformance=conforms,
        measurements=scorer.measure_scores(
            case.file,
            case.context,
            case.prompt_lengths,
            progress=stage(progress, "speed", "by length"),
        ),
        golden=golden,
    )


def _graph(case: RewardCase, scorer: Scorer) -> float:
    """How far the artifact's exact scores lie from those of its codes, on starts of some texts.

    Raises:
        ValidationFailed: it means another model, however its runtime rounds.
    """
    starts = [text[:SHORT] for text in case.pairs[HELD_OUT].texts[: 2 * _GOLDEN_PAIRS]]
    codes = reference.scores(case.codes, starts)
    exact = scorer.scores(case.file, starts, exact=True)
    found = max(abs(mine - theirs) for mine, theirs in zip(codes, exact, strict=True))
    if not found <= _SAME_SCORE * max(1.0, *map(abs, codes)):
        raise ValidationFailed(
            f"{case.file.name} computes another model than the one that was quantized",
            f"its exact scores are off by up to {found:.3g} from those of its codes",
            "report it with the model's config.json",
        )
    return found
