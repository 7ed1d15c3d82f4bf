"""Scores beside those of a reference: differences, spread, order."""

from __future__ import annotations

import math

import pytest

from slimport.errors import BadInput, ValidationFailed
from slimport.validation.preference import Pairs, compare

REFERENCE = [3.0, 1.0, 0.0, 2.0, 5.0, -1.0, 1.0, 0.5]  # margins 2, -2, 6, 0.5


def test_figures_are_those_of_the_definition() -> None:
    found = compare(REFERENCE, [3.5, 1.0, 0.0, 2.0, 5.0, -2.0, 0.0, 0.5])  # 2.5, -2, 7, -0.5
    assert found.score_rmse == pytest.approx(math.sqrt((0.25 + 1 + 1) / 8))
    assert found.score_max == 1
    assert found.margin_rmse == pytest.approx(math.sqrt((0.25 + 1 + 1) / 4))
    mean = sum(REFERENCE) / 8
    spread = math.sqrt(sum((score - mean) ** 2 for score in REFERENCE) / 8)
    assert found.score_error == pytest.approx(found.score_rmse / spread)
    assert (found.pair_agreement, found.pairs) == (0.75, 4)
    assert found.pair_agreement_error == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 8))
    assert (found.accuracy_reference, found.accuracy) == (0.75, 0.5)
    assert found.margins == ((2.0, 2.5), (-2.0, -2.0), (6.0, 7.0), (0.5, -0.5))


def test_a_shift_of_all_scores_keeps_the_order() -> None:
    found = compare(REFERENCE, [score + 1 for score in REFERENCE])
    assert (found.score_rmse, found.margin_rmse, found.pair_agreement) == (1, 0, 1)


def test_a_tie_is_another_order() -> None:
    assert compare([1.0, 0.0], [0.5, 0.5]).pair_agreement == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(BadInput, match="same score"):
        compare([1.0, 1.0, 1.0, 1.0], REFERENCE[:4])
    with pytest.raises(BadInput, match="4 and 2 pairs"):
        compare(REFERENCE, REFERENCE[:4])
    with pytest.raises(BadInput, match="0 and 0 pairs"):
        compare([], [])
    with pytest.raises(ValidationFailed, match=r"the artifact has a score .* pair 1"):
        compare(REFERENCE[:4], [1.0, 2.0, 3.0, math.nan])


def test_texts_stand_in_pairs_and_have_a_digest() -> None:
    pairs = Pairs(((1, 2), (3,)), ((4,), (5, 6)))
    assert pairs.texts == [(1, 2), (4,), (3,), (5, 6)]
    assert pairs.digest != Pairs(((1,), (2, 3)), ((4,), (5, 6))).digest
