"""CPU-seconds of rounding to ggml's types, ours beside ggml's kernels, in one process.

One matrix of a phone-sized model in blocks of rows on two threads, as in an export. Candidates take
turns; figures are medians of the rounds. The error is the relative RMSE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from meter import cost_of, middle

from slimport.quantize import blocks
from slimport.quantize.blocks import BlockGrid, BlockTensor
from slimport.quantize.grid import Float32
from slimport.quantize.methods import kquants
from slimport.quantize.subscales import LAYOUTS

_SHAPE = (5632, 2048)  # TinyLlama's up projection
_ROWS = 512
_THREADS = 2

Solve = Callable[[Float32, BlockGrid], BlockTensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(_SHAPE, np.float32) * np.float32(0.02)
    print(f"{'type':8}{'ggml CPU-s':>11}{'ours':>8}{'ratio':>7}", end="")
    print(f"{'ggml wall s':>13}{'ours':>8}{'ratio':>7}{'ggml error':>12}{'ours':>8}")
    for kind in LAYOUTS:
        _print_row(weight, BlockGrid(kind), rounds)


def _print_row(weight: Float32, grid: BlockGrid, rounds: int) -> None:
    solvers: tuple[Solve, Solve] = (blocks.solve, kquants.solve)
    errors = [_error(weight, _solve(solve, weight, grid)) for solve in solvers]
    costs = [
        [cost_of(partial(_solve, solve, weight, grid)) for solve in solvers] for _ in range(rounds)
    ]
    ggml, ours = (middle([pair[index] for pair in costs]) for index in range(2))
    print(
        f"{grid.name:8}{ggml.cpu:11.2f}{ours.cpu:8.2f}{ggml.cpu / ours.cpu:7.2f}"
        f"{ggml.wall:13.2f}{ours.wall:8.2f}{ggml.wall / ours.wall:7.2f}"
        f"{errors[0]:12.5f}{errors[1]:8.5f}",
        flush=True,
    )


def _solve(solve: Solve, weight: Float32, grid: BlockGrid) -> list[BlockTensor]:
    parts = [weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda part: solve(part, grid), parts))


def _error(weight: Float32, found: list[BlockTensor]) -> float:
    values = np.concatenate([tensor.dequantize() for tensor in found])
    missed, norm = (np.sum(np.square(x), dtype=float) for x in (values - weight, weight))
    return float(np.sqrt(missed / norm))


if __name__ == "__main__":
    main()
