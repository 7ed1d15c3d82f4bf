"""The verbs as functions: typed, raising SlimportError, printing nothing.

`export` is the main job: checkpoint > adapters > quantize > container > validate > bundle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import assembly, bundle
from .errors import BudgetExceeded, SlimportError, Unsupported, UsageError, ValidationFailed, worst
from .export import gguf
from .export.container import Container, ReadBack
from .quantize import quantizer
from .quantize.calibration import Windows
from .quantize.plan import Plan
from .quantize.store import Origin, QuantizedCheckpoint
from .recipe import Recipe
from .source import Source, open_source, plan_of
from .targets.target import Target, load_target
from .texts import Texts, read_texts
from .validation import budget, report
from .validation.budget import Budget
from .validation.judge import Case, Judgement, golden_json, judge
from .validation.runtime import Runtime
from .validation.runtimes import llamacpp
from .validation.runtimes.reference import Oracle

Progress = Callable[[str, int, int], None]
CONTAINERS: Mapping[str, Container] = {gguf.NAME: gguf}
RUNTIMES: Mapping[str, Runtime] = {gguf.NAME: llamacpp}


def _silent(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Job:
    """One target of an export: which container, and where the bundle will stand."""

    target: Target
    container: Container
    destination: Path


def export(
    recipe: Recipe,
    *,
    offline: bool = False,
    pre: str | None = None,
    validate: bool = True,
    progress: Progress = _silent,
) -> list[Path]:
    """Quantize once, then pack, judge and write one bundle per target; returns their folders.

    Raises:
        SlimportError: of the worst target; bundles of the other targets are in place.
    """
    source = open_source(recipe, offline=offline, pre=pre)
    plan = plan_of(recipe, source)
    jobs = plan_jobs(recipe, source, plan)
    with _work_folder(recipe.output) as work:
        texts = read_texts(recipe, source, plan, validate, progress)
        quantized = _quantize(source, plan, texts.calibration, work / "quantized", progress)
        failures: list[SlimportError] = []
        for job in jobs:
            try:
                _build(job, recipe, source, quantized, texts if validate else None, work, progress)
            except SlimportError as failure:
                failures.append(failure)
    _raise_worst(failures)
    return [job.destination for job in jobs]


def plan_jobs(recipe: Recipe, source: Source, plan: Plan) -> list[Job]:
    """Containers and destinations; everything that cannot be held exactly is refused here.

    Raises:
        UsageError: no target.
        Unsupported: a container that is not there yet, or that cannot hold the model.
    """
    if not recipe.targets:
        raise UsageError(
            "no target to export for",
            "a bundle is made for a device profile",
            "give --target android, or set `targets` in slimport.toml",
        )
    jobs = []
    for name in recipe.targets:
        target = load_target(name)
        container = _container(target, recipe.container)
        container.refuse(source.decoder, plan, source.tokenizer)
        if source.mode == "separate":
            for _, adapter in source.adapters:
                container.refuse_adapter(adapter)
        jobs.append(Job(target, container, recipe.output / target.name))
    return jobs


def _container(target: Target, wanted: str | None) -> Container:
    for name in (wanted,) if wanted else target.containers:
        if name in CONTAINERS:
            return CONTAINERS[name]
    preferred = wanted or ", ".join(target.containers)
    raise Unsupported(
        f"target {target.name}: container {preferred} is not there yet",
        f"slimport writes {', '.join(CONTAINERS)} so far",
        f"run it with --container {next(iter(CONTAINERS))}",
    )


def _quantize(
    source: Source, plan: Plan, windows: Windows | None, folder: Path, progress: Progress
) -> QuantizedCheckpoint:
    merged = source.adapters if source.mode == "merged" else ()
    origin = Origin(
        name=source.name,
        base=source.checkpoint.digest(),
        adapters={entry.name: adapter.digest() for entry, adapter in merged},
    )
    return quantizer.quantize(
        source.weights,
        source.config,
        plan,
        folder,
        calibration=windows,
        tokenizer_folder=source.checkpoint.folder,
        progress=progress,
        origin=origin,
    )


def _build(
    job: Job,
    recipe: Recipe,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts | None,
    work: Path,
    progress: Progress,
) -> None:
    """One bundle, from packing to the swap."""
    with bundle.building(job.destination) as folder:
        progress(f"packing {job.container.NAME}", 0, 1)
        job.container.write(quantized, source.tokenizer, folder)
        read_back = job.container.check(quantized, folder)
        if read_back.weights_digest != quantized.weights_digest:
            raise ValidationFailed(
                f"{job.container.NAME}: the file's codes are not those that were quantized",
                f"weights digest {read_back.weights_digest}, not {quantized.weights_digest}",
                "export again; if it stays, report it with the model's config.json",
            )
        files = _write_adapters(job, source, folder)
        progress(f"packing {job.container.NAME}", 1, 1)
        judgement = None
        golden = None
        if texts is not None:
            case = _case(job, source, quantized, texts, folder, files)
            judgement = judge(case, RUNTIMES[job.container.NAME], work, progress)
            golden = golden_json(judgement, case)
        assembly.write_tokenizer_notes(source, golden, folder)
        licenses = assembly.copy_licenses(source, texts.files if texts else [], folder)
