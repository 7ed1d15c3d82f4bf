"""K-means against exhaustive search and by hand, and what its codes promise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimport.quantize.grid import Float32, Grid
from slimport.quantize.methods import kmeans, rtn
from slimport.quantize.palette import LUT4_R16, LUT6_R16, PALETTE_GRIDS, PaletteGrid, PaletteTensor

GRIDS = pytest.mark.parametrize("grid", PALETTE_GRIDS.values(), ids=PALETTE_GRIDS)
SMALL = PaletteGrid("small", bits=1, group=2)


def gaussian(rows: int = 64, columns: int = 96, seed: int = 0) -> Float32:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05
    return values.astype(np.float32)


def importance(columns: int) -> Float32:
    return np.exp(1.5 * np.random.default_rng(9).standard_normal(columns)).astype(np.float32)


def error(weight: Float32, values: Float32, weighed: Float32 | float = 1.0) -> float:
    return float((np.square((values - weight).astype(np.float64)) * weighed).sum())


def least(values: Float32, weights: Float32, clusters: int) -> float:
    """The least error of all ways to cut the sorted values, each tried."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)

    def cost(start: int, stop: int) -> float:
        if start == stop:
            return 0.0
        part, by = x[start:stop], w[start:stop]
        return float((by * np.square(part - np.average(part, weights=by))).sum())

    cuts = combinations(range(x.size + 1), clusters - 1)
    return min(sum(cost(a, b) for a, b in pairwise((0, *cut, x.size))) for cut in cuts)


def test_two_levels_by_hand() -> None:
    weight = np.array([[0, 1], [10, 11], [3, 3], [3, 5]], np.float32)
    found = kmeans.solve(weight, SMALL)
    assert found.levels.tolist() == [[0.5, 10.5], [3, 5]]
    assert found.codes.tolist() == [[0, 0], [1, 1], [0, 0], [0, 1]]
    weighed = kmeans.solve(weight, SMALL, np.array([1, 3], np.float32))
    assert weighed.levels.tolist() == [[0.75, 10.75], [3, 5]]


def test_midway_between_two_levels_the_lower_one_wins() -> None:
    codes = kmeans.encode(np.array([[1, 2, 2.0001, 9]], np.float32), np.float32([[1, 3]]))
    assert codes.tolist() == [[0, 0, 1, 1]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-60, 60), min_size=10, max_size=10), st.integers(1, 2), st.booleans())
def test_no_other_clusters_leave_less_error(values: list[int], bits: int, alike: bool) -> None:
    weight = np.array(values, np.float32).reshape(2, 5)
    given = np.ones(5, np.float32) if alike else importance(5)
    grid = PaletteGrid("tiny", bits=bits, group=2)
    found = error(weight, kmeans.solve(weight, grid, given).dequantize(), given)
    weights = np.tile(given, 2)
    best = least(weight.reshape(-1), weights, grid.size)
    rounding = float(weights.sum()) * (60 * 2.0**-11) ** 2  # of the levels to float16
    assert found <= best + 2 * np.sqrt(best * rounding) + rounding


@GRIDS
@pytest.mark.parametrize("weighed", [False, True])
def test_places_for_borders_lose_next_to_nothing(
    grid: PaletteGrid, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group with more values than places, against the best borders anywhere."""
    rng = np.random.default_rng(3)
    given = importance(256) if weighed else np.ones(256, np.float32)
    for weight in (gaussian(16, 256), rng.standard_t(3, (16, 256)).astype(np.float32)):
        found = error(weight, kmeans.solve(weight, grid, given).dequantize(), given)
        with monkeypatch.context() as patched:
            patched.setattr(kmeans, "_PLACES", weight.size)
            best = error(weight, kmeans.solve(weight, grid, given).dequantize(), given)
        assert found < 1.01 * best


@GRIDS
def test_importance_lowers_the_weighed_error(grid: PaletteGrid) -> None:
    weight, given = gaussian(), importance(96)
    plain, weighed = kmeans.solve(weight, grid), kmeans.solve(weight, grid, given)
    assert error(weight, weighed.dequantize(), given) < error(weight, plain.dequantize(), given)
    assert error(weight, plain.dequantize()) < error(weight, weighed.dequantize())


def test_less_error_than_a_scale_for_each_row() -> None:
    """At as many bits per weight; int4-g32, at half a bit more, loses less of Gaussian weights."""
    weight, given = gaussian(64, 512), importance(512)
    uniform = Grid("int4-row", bits=4, low=-8, high=7, group=None)
    ours = kmeans.solve(weight, LUT4_R16, given).dequantize()
    theirs = rtn.solve(weight, uniform, importance=given).dequantize()
    assert error(weight, ours, given) < 0.85 * error(weight, theirs, given)
    assert error(weight, kmeans.solve(weight, LUT4_R16).dequantize()) < 0.85 * error(
        weight, rtn.solve(weight, uniform).dequantize()
    )


@GRIDS
def test_levels_ascend_and_every_code_is_the_nearest(grid: PaletteGrid) -> None:
    weight = gaussian()
    found = kmeans.solve(weight, grid, importance(96))
    assert (np.diff(found.levels, axis=1) > 0).all()
    levels = np.repeat(found.levels, 16, 0).astype(np.float64)
    distance = np.abs(levels[:, None] - weight[:, :, None])
    chosen = np.take_along_axis(distance, found.codes[:, :, None].astype(int), 2)[:, :, 0]
    np.testing.assert_array_equal(chosen, distance.min(2))


@GRIDS
@pytest.mark.parametrize("value", [0.0, -0.0, 0.25, -3.0])
def test_a_group_of_one_value_is_exact(grid: PaletteGrid, value: float) -> None:
    weight = gaussian(48)
    weight[16:32] = value
    found = kmeans.solve(weight, grid, importance(96))
    assert (found.dequantize()[16:32] == value).all()
    assert (found.levels[1] == value).all() and not found.codes[16:32].any()


def test_few_values_are_exact() -> None:
    weight = np.random.default_rng(0).integers(-5, 6, (16, 200)).astype(np.float32)
    np.testing.assert_array_equal(kmeans.solve(weight, LUT4_R16).dequantize(), weight)
    narrow = np.array([[1.5], [2.5]] * 8, np.float32)  # fewer weights than levels
    np.testing.assert_array_equal(kmeans.solve(narrow, LUT6_R16).dequantize(), narrow)


def test_inputs_that_never_mattered_decide_only_among_themselves() -> None:
    weight, none = gaussian(16, 64), np.zeros(64, np.float32)
    dead = none.copy()
    dead[:32] = 1
    alone = kmeans.solve(weight, LUT4_R16, none)
    assert alone.digest("w") == kmeans.solve(weight, LUT4_R16).digest("w")
    half = kmeans.solve(weight, LUT4_R16, dead)
    best = kmeans.solve(np.ascontiguousarray(weight[:, :32]), LUT4_R16)
    np.testing.assert_allclose(half.levels, best.levels, atol=2e-3)
    apart = weight.copy()
    apart[:, 32:] += 5
    found = kmeans.solve(apart, LUT4_R16, dead)
    assert np.abs(found.dequantize() - apart)[:, 32:].max() < 1


@GRIDS
def test_groups_of_rows_are_independent(grid: PaletteGrid) -> None:
    weight, given = gaussian(), importance(96)
    whole = kmeans.solve(weight, grid, given)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda w: kmeans.solve(w, grid, given), np.split(weight, 4)))
    again = PaletteTensor(
        grid,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.levels for part in parts]),
    )
    assert again.digest("w") == whole.digest("w")
    turned = np.asfortranarray(weight)
    assert kmeans.solve(turned, grid, given).digest("w") == whole.digest("w")


@pytest.mark.parametrize(
    ("grid", "digest"),
    [
        (LUT4_R16, "a9602e9f704248e1"),
        (LUT6_R16, "be72be306dd55e83"),
    ],
)
def test_the_same_bytes_on_any_machine(grid: PaletteGrid, digest: str) -> None:
    numbers = np.arange(32 * 128, dtype=np.uint32) * np.uint32(2654435761)
    weight = (numbers >> np.uint32(8)).astype(np.float32).reshape(32, 128) / np.float32(2**24)
    weight -= np.float32(0.5)
    weight *= weight * weight
    assert kmeans.solve(weight, grid, numbers[:128] % np.uint32(7)).digest("w")[:16] == digest
