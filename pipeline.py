"""The verbs as functions: typed, raising SlimportError, printing nothing.

`export` is the main job: checkpoint > adapters > quantize > container > validate > bundle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import bundle
from .adapters.recovery import refuse_other_codes
from .architectures import DecoderConfig, decoder_config
from .checkpoint import read_json
from .errors import BadInput, SlimportError, Unsupported, UsageError, ValidationFailed, worst
from .export.container import Base, Container
from .quantize import imatrix, quantizer, store, written
from .quantize.imatrix import Imatrix
from .quantize.plan import FLOAT, TRAINED, Plan
from .quantize.store import Origin, QuantizedCheckpoint
from .quantize.tensor import weights_digest
from .quantize.windows import Windows
from .recipe import Recipe
from .shipping import containers, fit, shipment, training
from .shipping.fit import Fit
from .shipping.shipment import Job, make_job, make_jobs, plan_jobs, refuse_plan
from .shipping.source import Source, open_source, origin_of, plan_of
from .shipping.texts import Texts, read_texts
from .targets.target import Limit, Target, load_target
from .validation import budget, report
from .validation.budget import Budget

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _unseen(found: Fit) -> None:
    pass


def export(
    recipe: Recipe,
    *,
    offline: bool = False,
    quantized: Path | None = None,
    stated: Collection[str] = (),
    validate: bool = True,
    progress: Progress = _silent,
    fitted: Callable[[Fit], None] = _unseen,
) -> list[Path]:
    """Quantize once, then pack, judge and write one bundle per target; returns their folders.

    Args:
        quantized: start from this quantized checkpoint of the recipe's model and adapters; its
            plan stands in place of the recipe's.
        stated: which of preset, method and patterns were asked for, and must be those of such a
            checkpoint.
        fitted: called with the plan that a search found, before anything is made by it.

    Raises:
        SlimportError: of the worst target; bundles of the other targets are in place.
    """
    source = open_source(recipe, offline=offline)
    if recipe.fit.is_wanted:
        return _export_fitted(recipe, source, quantized, validate, progress, fitted)
    ready = None if quantized is None else _same_origin(source, quantized)
    if ready is not None:
        _refuse_other_plan(ready, recipe, source, stated)
        recipe = _as_quantized(recipe, ready.plan)
    plan = plan_of(recipe, source) if ready is None else ready.plan
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
        return _build(jobs, recipe, source, ready, texts, work, progress)


def _build(
    jobs: list[Job],
    recipe: Recipe,
    source: Source,
    ready: QuantizedCheckpoint,
    texts: Texts,
    work: Path,
    progress: Progress,
    found: Fit | None = None,
) -> list[Path]:
    for entry, _ in source.adapters:
        refuse_other_codes(entry.path, entry.name, ready.weights_digest)
    failures: list[SlimportError] = []
    for job in jobs:
        try:
            shipment.build(job, recipe, source, ready, texts, work, progress, found)
        except SlimportError as failure:
            failures.append(failure)
    _raise_worst(failures)
    return [job.destination for job in jobs]


def _export_fitted(
    recipe: Recipe,
    source: Source,
    quantized: Path | None,
    validate: bool,
    progress: Progress,
    fitted: Callable[[Fit], None],
) -> list[Path]:
    """An export whose grids are searched first."""
    if quantized is not None:
        raise UsageError(
            "--quantized cannot be fitted",
            f"the grids of {quantized} are chosen already",
            "leave --quantized away, or --fit, --fit-memory and --max-kl",
        )
    if source.given is not None:
        raise UsageError(
            f"grids of {source.name} cannot be searched",
            f"{source.given.maker} chose them, and nothing is quantized twice",
            "leave --fit, --fit-memory and --max-kl away, or give the full-precision model",
        )
    jobs = make_jobs(recipe, source)
    search = fit.Search(recipe, source, jobs)
    with bundle.work_folder(recipe.output) as work:
        texts = read_texts(
            recipe,
            source,
            calibrate=True,
            validate=validate,
            progress=progress,
            context=min(job.deployment.context for job in jobs),
        )
        windows = fit.windows_to_measure(texts)
        losses, folder = fit.losses_of(search, windows, progress), work / "quantized"
        if recipe.fit.kl_mean is None:
            found = search.find(losses)
            fitted(found)
            ready = _quantize(source, found.plan, windows, folder, progress)
        else:
            calibrated, held = fit.split(windows)

            def solve(plan: Plan) -> QuantizedCheckpoint:
                return _quantize(source, plan, calibrated, folder, progress)

            def measure(made: QuantizedCheckpoint) -> float:
                from .quantize.sensitivity import divergence  # torch is loaded only to measure

                return divergence(source.weights, made, source.decoder, held, progress)

            found, ready = fit.within_loss(search, losses, recipe.fit.kl_mean, solve, measure)
            fitted(found)
        refuse_plan(jobs, source, found.plan)
        return _build(jobs, recipe, source, ready, texts, work, progress, found)


def _same_origin(source: Source, folder: Path) -> QuantizedCheckpoint:
    """A quantized checkpoint, if it was made from this source."""
    found = QuantizedCheckpoint.open(folder)
    wanted = origin_of(source)
    if replace(found.origin, name=wanted.name) != wanted:
        raise BadInput(
            f"{folder} was not quantized from {source.name} with these adapters",
            "its base, its adapters or their scales are others",
            "give the model and adapters that it was made from, or quantize again",
        )
    return found


def _refuse_other_plan(
    found: QuantizedCheckpoint, recipe: Recipe, source: Source, stated: Collection[str]
) -> None:
    """Raise UsageError if what was asked for is not what a checkpoint holds."""
    asked, cure = recipe.quantize, "leave it away: --quantized brings its own grids and methods"
    if "method" in stated and not found.plan.uses(asked.method):
        methods = ", ".join(sorted({choice.method for choice in found.plan.quantized}))
        why = f"its methods are {methods}"
        raise UsageError(f"{found.folder} was not quantized by method {asked.method}", why, cure)
    if not {"preset", "patterns"} & {*stated}:
        return
    if asked.method == TRAINED:
        recipe = recipe.override(method="gptq")
    wanted = {choice.weight.name: choice.grid for choice in plan_of(recipe, source).choices}
    for choice in found.plan.choices:
        if choice.grid != wanted[choice.weight.name]:
            held = choice.grid.name if choice.grid else FLOAT
            raise UsageError(
                f"{found.folder} was quantized to other grids than those given here",
                f"its preset is {found.plan.preset}, and {choice.weight.name} is {held}",
                cure,
            )


def _as_quantized(recipe: Recipe, plan: Plan) -> Recipe:
    """A recipe as the manifest records it: with the preset and method that a plan was made by."""
    linears = (choice.method for choice in plan.quantized if choice.weight.is_linear)
    method = next(linears, recipe.quantize.method)
    if (recipe.quantize.preset, recipe.quantize.method) == (plan.preset, method):
        return recipe
    given = replace(recipe.quantize, preset=plan.preset, method=method, patterns={})
    return replace(recipe, quantize=given)


def _quantize(
    source: Source,
    plan: Plan,
    calibration: Windows | Imatrix | None,
    folder: Path,
    progress: Progress,
) -> QuantizedCheckpoint:
    with ThreadPoolExecutor(1) as pool:
        origin = pool.submit(origin_of, source)
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


def _refuse_search(recipe: Recipe, verb: str) -> None:
    if recipe.fit.is_wanted:
        raise UsageError(
            f"{recipe.source} wants grids that fit, and `{verb}` cannot search them",
            "sizes are those of containers, and it makes none",
            "run `slimport export`, or remove [fit] and choose a preset",
        )


def quantize(
    recipe: Recipe,
    output: Path,
    *,
    format: str | None = None,
    offline: bool = False,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Write the quantized checkpoint of a recipe's model to `output`; returns its record.

    Args:
        format: one of quantize.written.NAMES, for transformers; None: slimport's own.

    Raises:
        UsageError: `output` holds something else, or another run is writing it.
        Unsupported: the format does not hold a grid.
    """
    _refuse_search(recipe, "quantize")
    if format is None:
        store.refuse_foreign(output)
    else:
        written.refuse_existing(output)
    source = open_source(recipe, offline=offline)
    plan = plan_of(recipe, source)
    if format is not None:
        plan = written.float_tables(plan)
        written.refuse(format, plan)
    texts = read_texts(recipe, source, calibrate=plan.calibrated, validate=False, progress=progress)
    with bundle.replacing(output, resumes=plan.calibrated and format is None) as partial:
        codes = partial if format is None else partial / "codes"
        quantized = _quantize(source, plan, texts.calibration, codes, progress)
        digest = quantized.weights_digest
        if format is not None:
            digest = written.write(format, quantized, partial)
            shutil.rmtree(codes)
    return {
        "schema": "slimport.quantize/1",
        "name": quantized.name,
        "format": format or "slimport",
        "weights_digest": digest,
        "float_digest": quantized.float_digest,
        "errors": dict(quantized.errors),
        "layers": dict(quantized.layers),
    }


def qat(
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    restart: bool = False,
    progress: Progress = _silent,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Train a recipe's model on its grids and write the quantized checkpoint; returns its record.

    A run that was killed goes on where it was saved last, to the same bytes. Of torchrun's
    processes all call it, the first writes, and the others get None.

    Args:
        restart: begin anew in place of that.
        say: called with a line for every measurement on held-out text.

    Raises:
        UsageError: no training text, `output` holds something else, or another run was killed
            there or is writing it.
    """
    _refuse_search(recipe, "qat")
    store.refuse_foreign(output)
    prepared = training.prepare(recipe, offline=offline)
    done = training.train(prepared, output, restart=restart, progress=progress, say=say)
    if done is None:
        return None
    trained, found = done
    return {
        "schema": "slimport.qat/1",
        "name": trained.name,
        "weights_digest": trained.weights_digest,
        "float_digest": trained.float_digest,
        "training": found,
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
