"""One option for each weight, the least loss within limits: a multiple-choice knapsack.

Solved as an integer program by HiGHS through scipy, which also says how far from the optimum its
answer can be at most (for the problem: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_GAP = 1e-6  # of the loss, that the solver may leave
_SECONDS = 60.0  # it answers within: models of 8B weights took less than one


@dataclass(frozen=True, slots=True)
class Option:
    """One grid of one weight.

    Attributes:
        name: of the grid.
        loss: what it costs, in nats per token.
        sizes: bytes by what is limited, such as a container's files.
    """

    name: str
    loss: float
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen.

    Attributes:
        chosen: {weight name: option}.
        bound: no choice within the limits has a smaller loss (or size) than this.
    """

    chosen: Mapping[str, Option]
    bound: float

    @property
    def loss(self) -> float:
        return sum(option.loss for option in self.chosen.values())

    def size(self, what: str) -> int:
        return sum(option.sizes[what] for option in self.chosen.values())


def least_loss(
    options: Mapping[str, Sequence[Option]], limits: Mapping[str, int]
) -> Allocation | None:
    """The options of the least total loss whose sizes keep every limit; None: there are none."""
    rows = {what: _sizes(options, what) for what in limits}
    return _solve(options, _losses(options), [(rows[what], limits[what]) for what in limits])


def least_size(
    options: Mapping[str, Sequence[Option]], what: str, loss: float, limits: Mapping[str, int]
) -> Allocation | None:
    """The options of the least total size whose loss is at most `loss`, within other limits."""
    bounds: list[tuple[Float64, float]] = [(_losses(options), loss)]
    bounds += [(_sizes(options, other), limits[other]) for other in limits]
    return _solve(options, _sizes(options, what), bounds)


def _losses(options: Mapping[str, Sequence[Option]]) -> Float64:
    return np.array([option.loss for each in options.values() for option in each])


def _sizes(options: Mapping[str, Sequence[Option]], what: str) -> Float64:
    return np.array([option.sizes[what] for each in options.values() for option in each], float)


def _solve(
    options: Mapping[str, Sequence[Option]],
    costs: Float64,
    bounds: Sequence[tuple[Float64, float]],
) -> Allocation | None:
    from scipy import optimize, sparse  # half a second, for searches alone

    counts = [len(each) for each in options.values()]
    weight = np.repeat(np.arange(len(counts)), counts)  # of each option
    one_each = sparse.csr_array((np.ones(weight.size), (weight, np.arange(weight.size))))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for row, limit in bounds:
        unit = row.max(initial=0) or 1.0  # coefficients near 1: losses are small, bytes are large
        constraints.append(optimize.LinearConstraint(row[None] / unit, -np.inf, limit / unit))
    scale = costs.max(initial=0) or 1.0
    found = optimize.milp(
        costs / scale,
        integrality=np.ones(weight.size),
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        return None
    ends = np.cumsum(counts)
    chosen = {
        name: each[int(np.argmax(part))]
        for (name, each), part in zip(options.items(), np.split(found.x, ends[:-1]), strict=True)
    }
    return Allocation(chosen, float(found.mip_dual_bound) * scale)
