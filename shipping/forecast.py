"""What an export would write and need, from shapes alone: `export --dry-run`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from ..architectures import Kind
from ..quantize import imatrix
from ..quantize.blocks import BlockGrid
from ..quantize.palette import PaletteGrid
from ..quantize.plan import Choice, Plan, grid_summary
from ..quantize.windows import IN_MEMORY
from ..recipe import Recipe
from . import fit
from .shipment import make_jobs, plan_jobs
from .source import Source, open_source, plan_of
from .texts import Progress, read_texts, refuse_missing

# Measured on two cores of a server CPU; a forecast, and said to be one.
_RTN_SECONDS = 4e-9  # per weight: search, packing, read-back, digests
_BLOCK_SECONDS = 3e-8  # in place of it for ggml's types
_KERNEL_SECONDS = 2e-7  # by ggml's kernels; from k-quants to i-quants a quarter to three times
_KMEANS_SECONDS = 2.5e-7  # for palettized grids; of 6 bits twice as long as of 4
_GPTQ_SECONDS = 1.3e-10  # per weight and input column of its matrix
_FORWARD_SECONDS = 1.5e-11  # per weight and token
_PASSES = {"gptq": 3, "autoround": 3, "auto": 3, "imatrix": 1}  # over the calibration text
_SOLVED = ("gptq", "autoround", "auto")  # the last two start with the first
_LEARNT = ("autoround", "auto")
_LEARNING_TOKENS = 3 * 200 * 2048 + 11 * 4096  # forward and backward, and looks at held windows
_LEARNING_MEMORY = 36  # bytes per weight of a layer
_TRIED_TOKENS = 4 * 4096  # auto: candidates on held windows, through the rest of the model
_JUDGE_SECONDS = 2.5e-11  # per weight and token: oracle, codes and artifact
_START_MEMORY = 350_000_000  # the libraries themselves
_BLOCK_MEMORY = 100_000_000  # blocks of rows in flight
# The first of the Linears that read one input.
_OWN_INPUTS = (Kind.Q, Kind.QKV, Kind.ATTENTION_OUTPUT, Kind.GATE, Kind.GATE_UP, Kind.DOWN)


@dataclass(frozen=True, slots=True)
class JobForecast:
    """One target: {file name: bytes}, to the byte but for those that are `estimated`."""

    target: str
    container: str
    files: Mapping[str, int]
    estimated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predictions in bytes and seconds; files are exact where their job does not call
    them estimated, the rest are estimates.

    Attributes:
        grids: weights and bytes by grid and method.
        floats: {matrix that keeps float16: why}.
        fallbacks: as Plan.fallbacks.
        memory: peak anonymous memory of the export itself, without validation's child processes.
        disk: all files at once, temporary ones included: activations past a limit, then logits.
        free_disk: of the output's file system.
    """

    model: str
    grids: list[dict[str, Any]]
    floats: Mapping[str, str]
    fallbacks: Mapping[str, list[str]]
    jobs: list[JobForecast]
    memory: int
    disk: int
    free_disk: int
    seconds: float
    fit: fit.Fit | None = None

    def to_json(self) -> dict[str, Any]:
        stated = {each.name: getattr(self, each.name) for each in fields(self)}
        found = stated.pop("fit")
        stated["jobs"] = [asdict(job) for job in self.jobs]
        searched = {} if found is None else {"fit": found.to_json()}
        return {"schema": "slimport.forecast/1", **stated, **searched}


def forecast(
    recipe: Recipe,
    *,
    offline: bool = False,
    validate: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Forecast:
    """Predict an export; refuses what the export would refuse.

    A search for grids measures losses, which takes a while, and makes nothing.

    Raises:
        SlimportError: as `pipeline.export` would before its work starts.
    """
    source = open_source(recipe, offline=offline)
    found = _searched(recipe, source, progress) if recipe.fit.is_wanted else None
    plan = plan_of(recipe, source) if found is None else found.plan
    refuse_missing(recipe, source, calibrate=plan.calibrated, validate=validate)
    if recipe.quantize.imatrix:
        imatrix.read(recipe.quantize.imatrix, source.decoder)
    jobs = [
        JobForecast(
            job.target.name,
            job.container.NAME,
            job.predict(source, plan),
            job.container.ESTIMATED,
        )
        for job in plan_jobs(recipe, source, plan)
    ]
    model_bytes = sum(sum(job.files.values()) for job in jobs)
    activations = _activations(recipe, plan, source)
    return Forecast(
        model=source.name,
        grids=grid_summary(plan),
        floats={
            choice.weight.name: choice.reason
            for choice in plan.choices
            if choice.weight.is_matrix and choice.grid is None
        },
        fallbacks=plan.fallbacks,
        jobs=jobs,
        memory=_memory(plan) + (activations if activations <= IN_MEMORY else 0),
        disk=model_bytes
        + max(sum(job.files.values()) for job in jobs)
        + max(activations if activations > IN_MEMORY else 0, _logits(recipe, source)),
        free_disk=_free(recipe.output),
        seconds=_seconds(recipe, plan, source),
        fit=found,
    )


def _searched(recipe: Recipe, source: Source, progress: Progress) -> fit.Fit:
    """The plan of a search; with a limit on the loss, by predictions alone."""
    search = fit.Search(recipe, source, make_jobs(recipe, source))
    texts = read_texts(recipe, source, calibrate=True, validate=False, progress=progress)
    return search.find(fit.losses_of(search, fit.windows_to_measure(texts), progress))


def _memory(plan: Plan) -> int:
    """Codes of the largest weight twice (solved and read back), or one layer of GPTQ.

    A layer is held in full precision and quantized, with two statistics for every kind of input;
    where it is learnt, with offsets, gradients and the activations of one step too.
    """
    largest = max(prod(choice.weight.shape) for choice in plan.choices)
    layer = [c for c in plan.choices if c.weight.layer == 0 and c.method in _SOLVED]
    learnt = [prod(c.weight.shape) for c in layer if c.method in _LEARNT]
    outputs = sum(c.weight.shape[0] for c in layer) if learnt else 0
    weights = sum(4 * prod(choice.weight.shape) for choice in layer)
    hessians = sum(
        4 * choice.weight.shape[1] ** 2 for choice in layer if choice.weight.kind in _OWN_INPUTS
    )
    solving = max((8 * prod(c.weight.shape) + 8 * c.weight.shape[1] ** 2 for c in layer), default=0)
    learning = _LEARNING_MEMORY * sum(learnt) + 4 * 2048 * 3 * outputs
    calibrated = 2 * weights + 2 * hessians + max(solving, learning)
    return _START_MEMORY + max(_BLOCK_MEMORY + 4 * largest, calibrated)


def _activations(recipe: Recipe, plan: Plan, source: Source) -> int:
    """Of two calibration streams."""
    if not plan.calibrated:
        return 0
    tokens = recipe.quantize.calibration_windows * recipe.quantize.calibration_length
    return 2 * 4 * tokens * source.decoder.hidden_size


def _logits(recipe: Recipe, source: Source) -> int:
    """On disk, of one text; scores of a reward model take none."""
    if source.decoder.reward:
        return 0
    judged = recipe.validate.windows * recipe.validate.window_length
    return min(3 * 4 * judged * source.decoder.vocab_size, 6_000_000_000)


def _seconds(recipe: Recipe, plan: Plan, source: Source) -> float:
    rounded = sum(_rounding(choice) * prod(choice.weight.shape) for choice in plan.choices)
    layers = sum(prod(choice.weight.shape) for choice in plan.choices if choice.weight.is_linear)
    solved = [choice.weight.shape for choice in plan.choices if choice.method in _SOLVED]
    learnt = sum(prod(c.weight.shape) for c in plan.choices if c.method in _LEARNT)
    passes = max((count for method, count in _PASSES.items() if plan.uses(method)), default=0)
    if recipe.quantize.imatrix:
        passes = 0
    tokens = recipe.quantize.calibration_windows * recipe.quantize.calibration_length
    judged = 2 * recipe.validate.windows * recipe.validate.window_length
    gptq = sum(_GPTQ_SECONDS * prod(shape) * shape[1] for shape in solved)
    forward = passes * _FORWARD_SECONDS * layers * tokens
    forward += _FORWARD_SECONDS * learnt * _LEARNING_TOKENS
    if plan.uses("auto"):
        forward += _FORWARD_SECONDS * layers * _TRIED_TOKENS * (source.decoder.layers + 1) / 2
    return 10 + rounded + gptq + forward + _JUDGE_SECONDS * plan.parameters * judged


def _rounding(choice: Choice) -> float:
    if isinstance(choice.grid, PaletteGrid):
        return _KMEANS_SECONDS
    if not isinstance(choice.grid, BlockGrid):
        return _RTN_SECONDS
    return _KERNEL_SECONDS if choice.method == "imatrix" else _BLOCK_SECONDS


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
