"""The knapsack against every choice that there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from slimport.quantize.allocation import Option, least_loss, least_size


def some(seed: int, weights: int = 5, grids: int = 4) -> dict[str, list[Option]]:
    random = np.random.default_rng(seed)
    found = {}
    for weight in range(weights):
        sizes = np.sort(random.integers(1, 1000, grids))
        losses = np.sort(random.lognormal(-6, 2, grids))[::-1]
        found[f"w{weight}"] = [
            Option(f"g{i}", float(losses[i]), {"a": int(sizes[i]), "b": int(sizes[-1 - i])})
            for i in range(grids)
        ]
    return found


def every(options: dict[str, list[Option]]) -> list[tuple[float, int, int]]:
    return [
        (sum(o.loss for o in c), sum(o.sizes["a"] for o in c), sum(o.sizes["b"] for o in c))
        for c in product(*options.values())
    ]


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_within_the_limits_loses_less(seed: int) -> None:
    options = some(seed)
    sizes = sorted(a for _, a, _ in every(options))
    limits = {"a": sizes[len(sizes) // 3], "b": sizes[len(sizes) // 2]}
    wanted = [loss for loss, a, b in every(options) if a <= limits["a"] and b <= limits["b"]]
    found = least_loss(options, limits)
    if not wanted:
        assert found is None
        return
    assert found is not None
    assert found.size("a") <= limits["a"] and found.size("b") <= limits["b"]
    assert found.loss == pytest.approx(min(wanted), rel=1e-5)
    assert found.bound <= found.loss * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_smaller_choice_loses_as_little(seed: int) -> None:
    options = some(seed)
    losses = sorted(loss for loss, _, _ in every(options))
    limit = losses[len(losses) // 4] * 1.001
    found = least_size(options, "a", limit, {})
    assert found is not None and found.loss <= limit * (1 + 1e-6)
    assert found.size("a") == min(a for loss, a, _ in every(options) if loss <= limit)


def test_what_cannot_be_is_not_found() -> None:
    options = some(1)
    least = sum(min(o.sizes["a"] for o in each) for each in options.values())
    assert least_loss(options, {"a": least - 1}) is None
    assert least_loss(options, {"a": least}) is not None
    assert least_size(options, "a", 0.0, {}) is None
