"""The verbs as functions: typed, raising SlimportError, printing nothing.

`export` is the main job: checkpoint > adapters > quantize > container > validate > bundle.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import bundle
from .architectures import DecoderConfig, decoder_config
from .checkpoint import read_json
from .errors import BadInput, SlimportError, Unsupported, UsageError, ValidationFailed, worst
from .export.container import Base, Container
from .quantize import imatrix, quantizer, store
from .quantize.imatrix import Imatrix
from .quantize.plan import Plan
from .quantize.store import Origin, QuantizedCheckpoint
from .quantize.tensor import weights_digest
from .quantize.windows import Windows
from .recipe import Recipe
from .shipping import containers, shipment
from .shipping.shipment import make_job, plan_jobs
from .shipping.source import Source, open_source, plan_of
from .shipping.texts import read_texts
from .targets.target import Limit, Target, load_target
from .validation import budget, report
from .validation.budget import Budget

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def export(
    recipe: Recipe,
    *,
    offline: bool = False,
    quantized: Path | None = None,
    validate: bool = True,
    progress: Progress = _silent,
) -> list[Path]:
    """Quantize once, then pack, judge and write one bundle per target; returns their folders.

    Args:
        quantized: start from this quantized checkpoint of the recipe's model and adapters.

    Raises:
        SlimportError: of the worst target; bundles of the other targets are in place.
    """
    source = open_source(recipe, offline=offline)
    plan = plan_of(recipe, source)
    ready = None if quantized is None else _same_origin(source, plan, quantized)
    jobs = plan_jobs(recipe, source, plan)
    with bundle.work_folder(recipe.output, resumes=plan.calibrated) as work:
        calibrate = (plan.calibrated and ready is None) or any(
            job.container.CALIBRATED for job in jobs
        )
        texts = read_texts(
            recipe,
            source,
            calibrate=calibrate,
            validate=validate,
            progress=progress,
            context=min(job.deployment.context for job in jobs),
        )
        if ready is None:
            ready = _quantize(source, plan, texts.calibration, work / "quantized", progress)
        failures: list[SlimportError] = []
        for job in jobs:
            try:
                shipment.build(job, recipe, source, ready, texts, work, progress)
            except SlimportError as failure:
                failures.append(failure)
    _raise_worst(failures)
    return [job.destination for job in jobs]


def _origin(source: Source) -> Origin:
    merged = source.adapters if source.mode == "merged" else ()
    return Origin(
        name=source.name,
        base=source.checkpoint.digest(),
        adapters={entry.name: adapter.digest() for entry, adapter in merged},
        scales={entry.name: entry.scale for entry, _ in merged},
    )


def _same_origin(source: Source, plan: Plan, folder: Path) -> QuantizedCheckpoint:
    """A quantized checkpoint, if it was made from this source by this plan."""
    found = QuantizedCheckpoint.open(folder)
    wanted = _origin(source)
    if replace(found.origin, name=wanted.name) != wanted:
        raise BadInput(
            f"{folder} was not quantized from {source.name} with these adapters",
            "its base, its adapters or their scales are others",
            "give the model and adapters that it was made from, or quantize again",
        )
    if found.plan != plan:
        raise UsageError(
            f"{folder} was quantized by another plan",
            f"its preset is {found.plan.preset}; this recipe chooses other grids or methods",
            "give the same preset, method and grids as to `slimport quantize`, or quantize again",
        )
    return found


def _quantize(
    source: Source,
    plan: Plan,
    calibration: Windows | Imatrix | None,
    folder: Path,
    progress: Progress,
) -> QuantizedCheckpoint:
    with ThreadPoolExecutor(1) as pool:
        origin = pool.submit(_origin, source)
        return quantizer.quantize(
            source.weights,
            source.config,
            plan,
            folder,
            calibration=calibration,
            tokenizer_folder=source.checkpoint.folder,
            progress=progress,
            origin=origin.result,
            resumes=plan.calibrated,  # the others take seconds
        )


def quantize(
    recipe: Recipe, output: Path, *, offline: bool = False, progress: Progress = _silent
) -> dict[str, Any]:
    """Write the quantized checkpoint of a recipe's model to `output`; returns its record.

    Raises:
        UsageError: `output` holds something else, or another run is writing it.
    """
    store.refuse_foreign(output)
    source = open_source(recipe, offline=offline)
    plan = plan_of(recipe, source)
    texts = read_texts(recipe, source, calibrate=plan.calibrated, validate=False, progress=progress)
    with bundle.replacing(output, resumes=plan.calibrated) as partial:
        quantized = _quantize(source, plan, texts.calibration, partial, progress)
    return {
        "schema": "slimport.quantize/1",
        "name": quantized.name,
        "weights_digest": quantized.weights_digest,
        "float_digest": quantized.float_digest,
        "errors": dict(quantized.errors),
    }


def measure_importance(
    recipe: Recipe, output: Path, *, offline: bool = False, progress: Progress = _silent
) -> dict[str, Any]:
    """Write the importance matrix of a recipe's model on its calibration text to `output`.

    Raises:
        UsageError: `output` exists.
    """
    from .quantize.calibration import importance  # torch is loaded only to calibrate

    imatrix.refuse_existing(output)
    recipe = recipe.override(method="imatrix")
    source = open_source(recipe, offline=offline)
    texts = read_texts(recipe, source, calibrate=True, validate=False, progress=progress)
    windows = texts.calibration
    if not isinstance(windows, Windows):
        raise UsageError(
            "an importance matrix is not made from another",
            f"the recipe names {texts.origins['calibration']} in place of a text",
            "give a text with --calibration FILE and remove `imatrix` from slimport.toml",
        )
    origin = texts.origins["calibration"]
    matrix = importance(source.weights, source.decoder, windows, progress, (origin,))
    imatrix.write(matrix, output, source.decoder)
    return {
        "schema": "slimport.imatrix/1",
        "path": str(output),
        "digest": matrix.digest,
        "weights": len(matrix.sums),
        "tokens": matrix.tokens,
        "text": origin,
    }


def validate(
    folder: Path, recipe: Recipe, *, offline: bool = False, progress: Progress = _silent
) -> dict[str, Any]:
    """Judge a bundle again, against the recipe's model, adapters and texts; changes nothing.

    Returns:
        The joined report, as `export` would write it now.

    Raises:
        BadInput: the bundle is damaged, or was made from another model or adapter.
    """
    manifest = bundle.verify(folder)
    container, decoder, plan = _contents(folder, manifest)
    source = open_source(recipe, offline=offline)
    _refuse_other_inputs(folder, manifest, source)
    job = make_job(Target.from_json(manifest["profile"]), container, source, folder)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        quantized = quantizer.restore(
            container.read_back(folder, decoder, _grids(plan)),
            manifest["config"],
            plan,
            work / "quantized",
            tokenizer_folder=source.checkpoint.folder,
            origin=Origin(source.name, manifest["inputs"]["model"]["digest"]),
            calibration=manifest["inputs"]["calibration"],
        )
        if quantized.weights_digest != manifest["weights_digest"]:
            stated = manifest["weights_digest"]
            raise _mismatch(folder, "all weights", quantized.weights_digest, stated)
        texts = read_texts(
            recipe,
            source,
            calibrate=False,
            validate=True,
            progress=progress,
            context=job.deployment.context,
        )
        files = job.files(source, plan)
        digests = manifest["digests"]
        base = Base(
            decoder, plan, source.tokenizer, job.deployment, quantized.weights_digest, digests
        )
        separate = source.adapters if source.mode == "separate" else ()
        for (entry, adapter), path in zip(separate, files.adapters, strict=True):
            container.check_adapter(path, adapter, base, entry.scale)
        texts = shipment.fitted_texts(job, texts, files)
        judged, _ = shipment.judged(job, source, quantized, texts, files, work, progress)
    errors = manifest["errors"]
    found = shipment.report_on(job, recipe, source, quantized, texts, files, judged, errors)
    found["inputs"] = manifest["inputs"] | found["inputs"]  # files do not show all that went in
    return report.joined(found, report.measurements(judged.measurements))


def _refuse_other_inputs(folder: Path, manifest: Mapping[str, Any], source: Source) -> None:
    stated = manifest["inputs"]
    known = [
        [entry[key] for key in ("name", "digest", "scale", "mode")] for entry in stated["adapters"]
    ]
    given = [[e.name, adapter.digest(), e.scale, source.mode] for e, adapter in source.adapters]
    pairs = [
        ("model", stated["model"]["digest"], source.checkpoint.digest()),
        ("set of adapters", known or "none", given or "none"),
    ]
    for what, made, now in pairs:
        if made != now:
            raise BadInput(
                f"{folder} was made from another {what}",
                f"the manifest says {made}, given is {now}",
                "give the model and adapters that the bundle was made from",
            )


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, and the codes in it against their digests.

    Raises:
        UsageError: no such folder.
        BadInput: a file or a code differs; its name.
    """
    manifest = bundle.verify(folder)
    container, decoder, plan = _contents(folder, manifest)
    grids = _grids(plan)
    digests = {
        name: weight.digest(name)
        for name, weight in container.read_back(folder, decoder, grids)
        if not isinstance(weight, np.ndarray)
    }
    for name in grids:
        if digests.get(name) != manifest["digests"].get(name):
            raise _mismatch(folder, name, digests.get(name), manifest["digests"].get(name))
    found = weights_digest(digests)
    if found != manifest["weights_digest"]:
        raise _mismatch(folder, "all weights", found, manifest["weights_digest"])
    for path in sorted((folder / "adapters").glob("*")):
        container.refuse_foreign_adapter(path, found)
    return {
        "schema": "slimport.verify/1",
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "weights_digest": found,
        "bundle_digest": manifest["bundle_digest"],
    }


def _contents(folder: Path, manifest: Mapping[str, Any]) -> tuple[Container, DecoderConfig, Plan]:
    """Container, decoder and plan as a manifest states them."""
    try:
        name = manifest["container"]
        decoder = decoder_config(manifest["config"])
        plan = Plan.from_json(manifest["plan"], decoder)
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{folder}: its manifest is incomplete",
            f"{type(error).__name__} {error}",
            "export the bundle again",
        ) from error
    if name not in containers.NAMES:
        raise Unsupported(
            f"{folder} holds container {name}",
            f"this slimport reads {', '.join(containers.NAMES)}",
            "use the slimport that made it",
        )
    return containers.load(name).container, decoder, plan


def _grids(plan: Plan) -> dict[str, str]:
    return {choice.weight.name: choice.grid.name for choice in plan.quantized if choice.grid}


def _mismatch(folder: Path, name: str, found: object, stated: object) -> BadInput:
    return BadInput(
        f"{folder}: the codes of {name} are not those of the manifest",
        f"their digest is {found}, not {stated}",
        "export the bundle again",
    )


def check(folder: Path, target: str | None = None) -> list[Budget]:
    """A bundle's measured figures beside its budgets, or beside those of another target.

    Raises:
        ValidationFailed: it was exported with --no-validate.
        BadInput: the bundle is damaged.
    """
    manifest = bundle.verify(folder)
    budget.require_validated(manifest)
    found = read_json(folder / "report" / "report.json")
    if target is not None:
        return budget.check(found, load_target(target).budgets)
    stated = {entry["metric"]: Limit(entry["limit"], entry["source"]) for entry in found["budgets"]}
    return budget.check(found, stated)


def report_of(folder: Path) -> dict[str, Any]:
    """The joined report and measurements of a bundle; the manifest of one that was not judged."""
    parts = folder / "report"
    if not parts.is_dir():
        return bundle.read_manifest(folder)
    return report.joined(read_json(parts / "report.json"), read_json(parts / "measurements.json"))


def failing_code(found: Mapping[str, Any]) -> int:
    """The exit code for a report that did not pass: 4 for accuracy, 3 for sizes."""
    broken = budget.failure(found)
    return broken.exit_code if broken else ValidationFailed.exit_code


def _raise_worst(failures: list[SlimportError]) -> None:
    """Nothing, the only failure, or the one whose exit code says most; the others in its words."""
    if not failures:
        return
    code = worst([failure.exit_code for failure in failures])
    first = next(failure for failure in failures if failure.exit_code == code)
    others = [failure.what for failure in failures if failure is not first]
    if others:
        first.what = "; and ".join([first.what, *others])
    raise first
