"""Seconds of GPTQ beside those of the Cholesky factorization that it cannot do without.

Random weights and the Hessian of random inputs, in the shapes of TinyLlama's Linears, on two
threads. `drift` is GPTQ as an export runs it, where what earlier layers lost is given back: that
takes two triangular solves with as many right sides as there are outputs. Candidates take turns;
figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from meter import Cost, cost_of, middle

from slimport.quantize.grid import INT4_G32, Float32
from slimport.quantize.methods import gptq

_SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # outputs, inputs
_THREADS = 2
_SAMPLES = 1.5  # inputs seen, of those that a Hessian has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(_THREADS)
    print(f"{'outputs':>8}{'inputs':>8}", end="")
    print(f"{'Cholesky CPU-s':>16}{'wall s':>8}{'GPTQ CPU-s':>12}{'wall s':>8}{'ratio':>7}", end="")
    print(f"{'drift CPU-s':>13}{'wall s':>8}{'ratio':>7}")
    for shape in _SHAPES:
        _print_row(*shape, rounds)


def _print_row(outputs: int, inputs: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, inputs), np.float32) * np.float32(0.02)
    drift = rng.standard_normal((outputs, inputs), np.float32) * np.float32(0.002)
    hessian = _hessian(rng, inputs)
    candidates: tuple[Callable[[], object], ...] = (
        partial(_factor, hessian),
        partial(gptq.solve, weight, INT4_G32, hessian),
        partial(gptq.solve, weight, INT4_G32, hessian, drift),
    )
    for work in candidates[1:]:
        work()  # compiled, and its memory is there
    costs = [[cost_of(work) for work in candidates] for _ in range(rounds)]
    factor, plain, drifting = (middle([round_[index] for round_ in costs]) for index in range(3))
    print(f"{outputs:8}{inputs:8}{factor.cpu:16.2f}{factor.wall:8.2f}", end="")
    print(f"{_shown(plain, factor, 12)}{_shown(drifting, factor, 13)}", flush=True)


def _shown(cost: Cost, factor: Cost, width: int) -> str:
    return f"{cost.cpu:{width}.2f}{cost.wall:8.2f}{cost.wall / factor.wall:7.2f}"


def _hessian(rng: np.random.Generator, inputs: int) -> Float32:
    seen = torch.from_numpy(rng.standard_normal((int(_SAMPLES * inputs), inputs), np.float32))
    seen *= torch.from_numpy(np.exp(rng.standard_normal(inputs, np.float32)))
    hessian: Float32 = (seen.T @ seen / len(seen)).numpy()
    return hessian


def _factor(hessian: Float32) -> torch.Tensor:
    damped = torch.from_numpy(hessian.copy())
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    return torch.linalg.cholesky(damped, upper=True)


if __name__ == "__main__":
    main()
