"""How far scores lie from those of a reference, on pairs of a chosen and a rejected answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, ValidationFailed

Float64 = npt.NDArray[np.float64]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Token ids of whole texts, prompt and answer: pair i is chosen[i] and rejected[i].

    `chats`: whether they were written by the chat template.
    """

    chosen: tuple[Ids, ...]
    rejected: tuple[Ids, ...]
    chats: bool = False

    @property
    def texts(self) -> list[Ids]:
        """All of them, each pair's chosen answer before its rejected one."""
        return [text for pair in zip(self.chosen, self.rejected, strict=True) for text in pair]

    @property
    def digest(self) -> str:
        """`sha256:...` over the ids."""
        words = json.dumps(self.texts, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(words.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Scores of an artifact beside those of a reference.

    A margin is the score of the chosen answer less that of the rejected one.

    Attributes:
        score_rmse, score_max: of the differences of scores, over both answers of all pairs.
        score_error: score_rmse over the standard deviation of the reference's scores.
        margin_rmse: of the differences of margins.
        pair_agreement: share of pairs that both put in the same order.
        pair_agreement_error: its standard error with two successes and two failures added (Agresti
            and Coull), which is not zero where all pairs agree.
        accuracy_reference, accuracy: share of pairs with the chosen answer ahead.
        pairs: how many were compared.
        margins: of the reference and of the artifact, by pair.
    """

    score_rmse: float
    score_max: float
    score_error: float
    margin_rmse: float
    pair_agreement: float
    pair_agreement_error: float
    accuracy_reference: float
    accuracy: float
    pairs: int
    margins: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"margins": [list(pair) for pair in self.margins]}


def compare(reference: Sequence[float], artifact: Sequence[float]) -> Agreement:
    """Compare the scores of `Pairs.texts`.

    Raises:
        BadInput: the numbers of scores differ, there is no pair, or the reference gives one score
            to every text.
        ValidationFailed: a score is not finite.
    """
    expected, found = _scores(reference, "the reference"), _scores(artifact, "the artifact")
    if expected.shape != found.shape or not expected.size:
        raise BadInput(
            f"scores of {len(expected)} and {len(found)} pairs cannot be compared",
            "both are of the same pairs, one pair at least",
            "score both on the same texts",
        )
    spread = float(expected.std())
    if spread == 0:
        raise BadInput(
            "the reward model gives every text the same score",
            "whether an artifact agrees with it has no meaning",
            "give other pairs, or check the score head of the model",
        )
    differences = found - expected
    margins = np.stack([expected, found])
    margins = margins[:, :, 0] - margins[:, :, 1]
    same = np.sign(margins[0]) == np.sign(margins[1])
    agreement, count = float(same.mean()), len(expected)
    return Agreement(
        score_rmse=_rms(differences),
        score_max=float(np.abs(differences).max()),
        score_error=_rms(differences) / spread,
        margin_rmse=_rms(margins[1] - margins[0]),
        pair_agreement=agreement,
        pair_agreement_error=_standard_error(agreement, count),
        accuracy_reference=float((margins[0] > 0).mean()),
        accuracy=float((margins[1] > 0).mean()),
        pairs=count,
        margins=tuple((float(mine), float(theirs)) for mine, theirs in margins.T),
    )


def _scores(values: Sequence[float], whose: str) -> Float64:
    """float64 (pairs, 2)"""
    scores = np.asarray(values, np.float64).reshape(-1, 2)
    if not np.isfinite(scores).all():
        pair = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise ValidationFailed(
            f"{whose} has a score that is not finite in pair {pair}",
            "a NaN or an infinity appeared in its forward pass",
            "use a finer grid, or keep the layer that overflows in float16",
        )
    return scores


def _standard_error(share: float, count: int) -> float:
    share, count = (share * count + 2) / (count + 4), count + 4
    return math.sqrt(share * (1 - share) / count)


def _rms(values: Float64) -> float:
    return float(np.sqrt(np.square(values).mean()))
