"""The grids of a model under a limit of bytes, memory or loss: candidates, sizes, the search.

What each grid of each weight loses is measured (quantize/sensitivity.py), what it takes is what the
containers of all targets say; an integer program chooses (quantize/allocation.py). One plan serves
all targets: weights are quantized once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Unsupported, UsageError
from ..quantize.allocation import Allocation, Option, least_loss, least_size
from ..quantize.given import Given
from ..quantize.plan import PRESETS, Choice, Plan, make_plan
from ..quantize.store import QuantizedCheckpoint
from ..quantize.windows import Windows, windows_of
from ..recipe import Recipe
from ..settings import format_size
from ..validation.planned_memory import KNOWN
from .shipment import Job, refuse_plan
from .source import Source
from .texts import Texts

Progress = Callable[[str, int, int], None]
Sizes = dict[str, int]
Losses = Mapping[str, Mapping[str, float]]

# What is tried where the recipe names nothing: from the fewest bits to the most.
CANDIDATES = (
    *("int2-g256", "int2-g64", "Q2_K", "Q3_K", "lut4-r16", "IQ4_XS", "int4-g32", "Q4_K"),
    *("Q5_K", "lut6-r16", "Q6_K", "int8-row"),
)
_DEVICE, _MEMORY = "device ", "memory "  # and the target: what is limited
_TOKENS = 8192  # that sensitivities are measured on
_FRONTIER = 16  # points
_TRIES = 4  # of a limit on the loss, or on sizes that do not quite add up
_ROOM = 0.9  # of a limit on the loss, for what the runtime adds
_CLOSE = 0.95  # of that: near enough to stop


@dataclass(frozen=True, slots=True)
class Point:
    """The least loss (nats per token) that any plan of at most `nbytes` on the device has."""

    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Fit:
    """What a search found.

    Attributes:
        plan: its choices say what it lost by it.
        limits: metric -> limit.
        predicted: nats per token, the losses of all weights added up.
        bound: no plan of these grids within the limits loses less (or is smaller, if `kl_mean` is
            limited), by the same predictions.
        sizes: {target: predicted bytes on the device}.
        memory: {target: predicted bytes of memory}, where it is limited.
        uniform: {grid: (bytes of the first target, loss)} of one grid for all layers.
        frontier: from the smallest plan to the largest, for the first target.
        measured: KL of the codes to full precision on windows that nothing was calibrated on, if
            the loss is limited.
    """

    plan: Plan
    limits: Mapping[str, float]
    predicted: float
    bound: float
    sizes: Mapping[str, int]
    memory: Mapping[str, int]
    uniform: Mapping[str, Point]
    frontier: Sequence[Point]
    measured: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The key "fit" of report.json."""
        return {
            "limits": dict(self.limits),
            "kl_predicted": self.predicted,
            "bound": self.bound,
            "kl_measured": self.measured,
            "device_bytes": dict(self.sizes),
            "uniform": {
                grid: {"device_bytes": point.nbytes, "kl": point.loss}
                for grid, point in self.uniform.items()
            },
            "frontier": [[point.nbytes, point.loss] for point in self.frontier],
        }


class Search:
    """The options of every weight, with sizes and losses, and the plans made of them."""

    def __init__(self, recipe: Recipe, source: Source, jobs: Sequence[Job]) -> None:
        """Candidates and sizes; measures nothing.

        Raises:
            Unsupported: a reward model, or no grid that every container holds.
            UsageError: an unknown grid, or a method that chooses no codes here.
        """
        if source.decoder.reward:
            raise Unsupported(
                "the grids of a reward model cannot be searched",
                "losses are those of the probabilities of tokens, and it has none",
                "choose a preset: --preset int4 or --preset int8",
            )
        if isinstance(source.weights, Given):
            raise Unsupported(
                f"the grids of {source.name} cannot be searched",
                "it is quantized already, and other grids would quantize it twice",
                "give the full-precision model, or leave the limits of [fit] away",
            )
        self.recipe, self.source, self.jobs = recipe, source, jobs
        self._limited = _limited(recipe, jobs)
        self.choices: dict[str, list[Choice]] = {}
        self._sizes: dict[tuple[str, str], Sizes] = {}
        self.method = _method(recipe)
        self._base = _base_plan(recipe, source, jobs)
        for plan, kind in _plans(recipe, source, jobs, self._base):
            sizes = {job.target.name: _bytes_of(job, source, plan) for job in jobs}
            memory = {job.target.name: _memory_of(job, source, plan) for job in jobs}
            for choice in plan.quantized:
                name, grid = choice.weight.name, choice.grid
                assert grid is not None
                if choice.weight.kind is not kind or (name, grid.name) in self._sizes:
                    continue
                self.choices.setdefault(name, []).append(choice)
                self._sizes[name, grid.name] = {
                    **{_DEVICE + target: found[name] for target, found in sizes.items()},
                    **{_MEMORY + target: found.get(name, 0) for target, found in memory.items()},
                }
        self._fixed = self._overhead()

    def _overhead(self) -> Sizes:
        """What a plan takes beyond the sizes of its options; here one of the first of each."""
        first = {name: choices[0] for name, choices in self.choices.items()}
        choices = tuple(first.get(c.weight.name, c) for c in self._base.choices)
        totals = _totals(self.jobs, self.source, Plan("fit", choices))
        for name, choice in first.items():
            assert choice.grid is not None
            for what, size in self._sizes[name, choice.grid.name].items():
                totals[what] -= size
        return totals

    def options(self, losses: Losses) -> dict[str, list[Option]]:
        return {
            name: [
                Option(c.grid.name, losses[name][c.grid.name], self._sizes[name, c.grid.name])
                for c in choices
                if c.grid is not None
            ]
            for name, choices in self.choices.items()
        }

    def plan_of(self, allocation: Allocation) -> Plan:
        found = []
        for choice in self._base.choices:
            name = choice.weight.name
            if option := allocation.chosen.get(name):
                made = next(c for c in self.choices[name] if c.grid and c.grid.name == option.name)
                reason = f"fit: {option.loss:.2e} nats"
                choice = replace(made, reason=reason)
            found.append(choice)
        return Plan("fit", tuple(found))

    def find(self, losses: Losses, kl_limit: float | None = None) -> Fit:
        """The best plan within the limits of the recipe; `kl_limit` in place of its own.

        Raises:
            Unsupported: there is none, with the smallest size (or loss) that there is.
        """
        options = self.options(losses)
        limits = {what: limit - self._fixed[what] for what, limit in self._limited.items()}
        wanted = self.recipe.fit.kl_mean if kl_limit is None else kl_limit
        smallest = _DEVICE + self.jobs[0].target.name
        for _ in range(_TRIES):
            if wanted is None:
                found = least_loss(options, limits)
            else:
                found = least_size(options, smallest, wanted, limits)
            if found is None:
                raise self._infeasible(options, wanted)
            plan = self.plan_of(found)
            totals = _totals(self.jobs, self.source, plan)
            over = {what: totals[what] - limit for what, limit in self._limited.items()}
            if max(over.values(), default=0) <= 0:
                return self._found(plan, found, options, totals)
            limits = {what: limits[what] - max(0, excess) for what, excess in over.items()}
        raise self._infeasible(options, wanted)

    def _found(
        self,
        plan: Plan,
        found: Allocation,
        options: Mapping[str, Sequence[Option]],
        totals: Mapping[str, int],
    ) -> Fit:
        first = _DEVICE + self.jobs[0].target.name
        bound = found.bound
        if self.recipe.fit.kl_mean is not None:
            bound += self._fixed[first]
        return Fit(
            plan=plan,
            limits=self.recipe.fit.limits,
            predicted=found.loss,
            bound=bound,
            sizes=_by_target(totals, _DEVICE),
            memory=_by_target(totals, _MEMORY) if self.recipe.fit.memory_bytes else {},
            uniform=self._uniform(options, first),
            frontier=self._frontier(options, first),
        )

    def _frontier(self, options: Mapping[str, Sequence[Option]], what: str) -> list[Point]:
        ends = [
            sum(pick(option.sizes[what] for option in each) for each in options.values())
            for pick in (min, max)
        ]
        points = []
        for step in range(_FRONTIER + 1):
            limit = ends[0] + (ends[1] - ends[0]) * step // _FRONTIER
            if found := least_loss(options, {what: limit}):
                points.append(Point(found.size(what) + self._fixed[what], found.loss))
        return points

    def _uniform(self, options: Mapping[str, Sequence[Option]], what: str) -> dict[str, Point]:
        """Of each grid that every layer can have, tables as the recipe's preset has them."""
        tables = {
            choice.weight.name: choice.grid.name
            for choice in self._base.choices
            if choice.weight.is_table and choice.grid
        }
        found = {}
        for grid in dict.fromkeys(o.name for each in options.values() for o in each):
            chosen = [
                next((o for o in each if o.name == tables.get(name, grid)), None)
                for name, each in options.items()
            ]
            held = [option for option in chosen if option is not None]
            if len(held) == len(chosen):
                nbytes = sum(option.sizes[what] for option in held) + self._fixed[what]
                found[grid] = Point(nbytes, sum(option.loss for option in held))
        return found

    def _infeasible(
        self, options: Mapping[str, Sequence[Option]], wanted: float | None
    ) -> Unsupported:
        """The smallest size, or the smallest loss, that there is."""
        for what, limit in self._limited.items():
            least = sum(min(o.sizes[what] for o in each) for each in options.values())
            if (least := least + self._fixed[what]) > limit:
                kind, _, target = what.partition(" ")
                flag = "--fit" if kind == _DEVICE.strip() else "--fit-memory"
                return Unsupported(
                    f"no choice of grids fits {format_size(limit)} of {kind} for {target}",
                    f"the smallest takes {format_size(least)}, of which"
                    f" {format_size(self._fixed[what])} do not depend on grids",
                    f"give {flag} {least / 1e6 + 0.01:.2f}MB or more, or a smaller model",
                )
        limits = {what: limit - self._fixed[what] for what, limit in self._limited.items()}
        best = least_loss(options, limits)
        loss = "none at all" if best is None else f"{best.loss:.2g} nats"
        return Unsupported(
            f"no choice of grids keeps all limits: {_words(self.recipe.fit.limits)}",
            f"within the sizes the least loss is {loss}, and {wanted or 0:.2g} is wanted",
            "raise --max-kl or --fit, or give finer grids with --fit-grid",
        )


def windows_to_measure(texts: Texts) -> Windows:
    """The calibration text that losses are measured on.

    Raises:
        UsageError: there is an importance matrix in its place.
    """
    if isinstance(texts.calibration, Windows):
        return texts.calibration
    raise UsageError(
        "grids cannot be searched by an importance matrix",
        "losses are measured on text",
        "give a text with --calibration FILE in place of --imatrix",
    )


def losses_of(search: Search, windows: Windows, progress: Progress) -> Losses:
    """What each option loses, measured on some of `windows`, or read from the recipe's file.

    Raises:
        BadInput: the file holds something else.
        UsageError: it belongs to another model, text or method.
    """
    from ..quantize import sensitivity  # torch is loaded only to measure

    chosen, path = _some(windows), search.recipe.fit.sensitivities
    wanted = _subject(search.source, chosen, search.method)
    known: dict[str, dict[str, float]] = {}
    if path is not None and path.exists():
        found = sensitivity.Sensitivities.read(path)
        if found.subject != wanted:
            odd = min(key for key in wanted if found.subject.get(key) != wanted[key])
            raise UsageError(
                f"the sensitivities in {path.name} are not those of this export",
                f"they were measured with {odd} {found.subject.get(odd)}, here it is {wanted[odd]}",
                "name another file with --sensitivities, or remove this one",
            )
        known = {name: dict(row) for name, row in found.losses.items()}
    missing = {
        name: [c for c in choices if c.grid and c.grid.name not in known.get(name, {})]
        for name, choices in search.choices.items()
    }
    missing = {name: choices for name, choices in missing.items() if choices}
    if missing:
        source = search.source
        measured = sensitivity.measure(source.weights, source.decoder, chosen, missing, progress)
        for name, row in measured.items():
            known.setdefault(name, {}).update(row)
        if path is not None:
            sensitivity.Sensitivities(known, wanted).write(path)
    return known


def _subject(source: Source, windows: Windows, method: str) -> dict[str, Any]:
    """What sensitivities belong to."""
    merged = source.adapters if source.mode == "merged" else ()
    return {
        "base": source.checkpoint.digest(),
        "adapters": {adapter.digest(): entry.scale for entry, adapter in merged},
        "windows": windows.digest,
        "method": method,
    }


def _some(windows: Windows) -> Windows:
    """As many of the calibration windows as losses are measured on, evenly spread."""
    count, length = windows.ids.shape
    step = max(1, count * length // _TOKENS)
    return windows_of(windows.ids[::step])


def split(windows: Windows) -> tuple[Windows, Windows]:
    """Windows to calibrate on, and every eighth, to measure a plan on.

    Raises:
        UsageError: there are fewer than two.
    """
    if len(windows.ids) < 2:
        raise UsageError(
            "one window of calibration text cannot be split",
            "a limit on the loss is measured on windows that nothing was calibrated on",
            "give a longer text: --calibration FILE",
        )
    held = [index for index in range(len(windows.ids)) if index % 8 == 1]
    kept = [index for index in range(len(windows.ids)) if index % 8 != 1]
    return windows_of(windows.ids[kept]), windows_of(windows.ids[held])


def within_loss(
    search: Search,
    losses: Losses,
    limit: float,
    solve: Callable[[Plan], QuantizedCheckpoint],
    measure: Callable[[QuantizedCheckpoint], float],
) -> tuple[Fit, QuantizedCheckpoint]:
    """The smallest plan whose codes, once made, lose nine tenths of `limit` at most.

    Predictions are corrected by what the last plan really lost, and the search begun again.

    Raises:
        Unsupported: no plan was found to lose so little.
    """
    allowed = limit * _ROOM
    factor, best = 1.0, None
    for _ in range(_TRIES):
        found = search.find(losses, allowed / factor)
        if best is not None and found.plan == best.plan:
            break
        made = solve(found.plan)
        lost = measure(made)
        found = replace(found, measured=lost)
        if lost <= allowed and (best is None or _first(found) < _first(best)):
            best = found
            if lost >= _CLOSE * allowed:
                return best, made
        factor = max(lost / found.predicted, 1e-3)
    if best is None:
        raise Unsupported(
            f"no plan was found that loses {limit:.3g} nats or less",
            f"the last one lost {lost:.3g} where {found.predicted:.3g} were predicted",
            "raise --max-kl, or give finer grids with --fit-grid",
        )
    return best, solve(best.plan)


def _first(found: Fit) -> int:
    return next(iter(found.sizes.values()))


def _limited(recipe: Recipe, jobs: Sequence[Job]) -> Sizes:
    fit, names = recipe.fit, [job.target.name for job in jobs]
    limits: Sizes = {}
    if fit.device_bytes is not None:
        limits |= {_DEVICE + name: fit.device_bytes for name in names}
    if fit.memory_bytes is not None:
        for job in jobs:
            if job.container.NAME not in KNOWN:
                raise Unsupported(
                    f"the memory of container {job.container.NAME} cannot be planned",
                    f"from shapes alone it is known for {', '.join(KNOWN)}",
                    "limit the size in its place: --fit SIZE",
                )
        limits |= {_MEMORY + name: fit.memory_bytes for name in names}
    return limits


def _by_target(totals: Mapping[str, int], what: str) -> Sizes:
    return {key.removeprefix(what): size for key, size in totals.items() if key.startswith(what)}


def _totals(jobs: Sequence[Job], source: Source, plan: Plan) -> Sizes:
    """What a plan takes of every target."""
    found: Sizes = {}
    for job in jobs:
        found[_DEVICE + job.target.name] = job.device_bytes(source, plan)
        planned = job.memory(source, plan)
        found[_MEMORY + job.target.name] = planned.memory.total if planned else 0
    return found


def _bytes_of(job: Job, source: Source, plan: Plan) -> Sizes:
    return job.container.tensor_bytes(source.decoder, plan)


def _memory_of(job: Job, source: Source, plan: Plan) -> Sizes:
    planned = job.memory(source, plan)
    return planned.weights if planned else {}


def _base_plan(recipe: Recipe, source: Source, jobs: Sequence[Job]) -> Plan:
    """A plan that every container holds: the recipe's preset first."""
    patterns, method = recipe.quantize.patterns, _method(recipe)
    presets = dict.fromkeys([recipe.quantize.preset, *PRESETS])
    refused: Unsupported | None = None
    for preset in presets:
        try:
            plan = make_plan(source.decoder, preset, method, patterns)
            refuse_plan(jobs, source, plan)
        except Unsupported as error:
            refused = refused or error
        except UsageError:
            if preset == recipe.quantize.preset:
                raise
        else:
            return plan
    assert refused is not None
    raise refused


def _method(recipe: Recipe) -> str:
    """The recipe's, to search with."""
    return recipe.quantize.method if recipe.quantize.search else "rtn-absmax"


def _plans(
    recipe: Recipe, source: Source, jobs: Sequence[Job], base: Plan
) -> Iterator[tuple[Plan, Any]]:
    """A plan for each grid of each kind of matrix, all others as in `base`; what is held alone.

    Weights that a pattern of the recipe names keep what it says.
    """
    wanted = recipe.fit.grids or CANDIDATES
    named = {c.weight.name for c in base.choices if c.reason.startswith("pattern")}
    kinds = dict.fromkeys(choice.weight.kind for choice in base.choices if choice.weight.is_matrix)
    held, refused = 0, None
    for grid in wanted:
        try:
            every = make_plan(source.decoder, base.preset, _method(recipe), {"*": grid})
        except UsageError:
            if recipe.fit.grids:
                raise
            continue
        for kind in kinds:
            choices = tuple(
                new if old.weight.kind is kind and old.weight.name not in named else old
                for old, new in zip(base.choices, every.choices, strict=True)
            )
            plan = Plan(base.preset, choices)
            tried = [c for c in choices if c.weight.kind is kind and c.weight.name not in named]
            if any(choice.weight.is_matrix and choice.grid is None for choice in tried):
                continue
            try:
                refuse_plan(jobs, source, plan)
            except Unsupported as error:
                refused = error
                continue
            held += 1
            yield plan, kind
    if not held:
        raise refused or Unsupported(
            f"none of the grids {', '.join(wanted)} divides the weights of this model",
            "its rows are of other lengths",
            "give others with --fit-grid",
        )


def _words(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in limits.items())
