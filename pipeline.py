"""The verbs as functions: typed, raising SlimportError, printing nothing.

`export` is the main job: checkpoint > adapters > quantize > container > validate > bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import assembly, bundle
from .architectures import DecoderConfig, decoder_config
from .checkpoint import read_json
from .errors import BadInput, SlimportError, Unsupported, UsageError, ValidationFailed, worst
from .export import gguf
from .export.container import Container
from .quantize import quantizer
from .quantize.windows import Windows
from .quantize.plan import Plan
from .quantize.store import Origin, QuantizedCheckpoint
from .quantize.tensor import QuantizedTensor, weights_digest
from .recipe import Recipe
from .source import Source, open_source, plan_of
from .targets import limits
from .targets.target import Limit, Target, load_target
from .texts import Texts, oracle, read_texts
from .validation import budget, report
from .validation.budget import Budget
from .validation.footprint import footprint
from .validation.judge import Case, Judgement, golden_json, judge
from .validation.runtime import Memory, Runtime
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
    with bundle.work_folder(recipe.output) as work:
        texts = read_texts(recipe, source, plan, validate, progress)
        quantized = _quantize(source, plan, texts.calibration, work / "quantized", progress)
        failures: list[SlimportError] = []
        for job in jobs:
            try:
                _build(job, recipe, source, quantized, texts, work, progress)
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
    texts: Texts,
    work: Path,
    progress: Progress,
) -> None:
    """One bundle, from packing to the swap; a broken budget leaves it at NAME.failed."""
    with bundle.building(job.destination) as folder:
        files = _pack(job, source, quantized, folder, progress)
        judgement = None
        golden = None
        if texts.judged:
            case = _case(job, source, quantized, texts, files)
            judgement = judge(case, RUNTIMES[job.container.NAME], work, progress)
            golden = golden_json(judgement, case)
        assembly.write_tokenizer_notes(source, golden, folder)
        assembly.copy_licenses(source, texts.files, folder)
        found = _report(job, recipe, source, quantized, texts, files, judgement)
        report.write(
            folder / "report", found, report.measurements(judgement.measurements if judgement else None)
        )
        assembly.write_readme(
            job.container, job.target, source, found, files.model, files.adapters, folder
        )
        bundle.write_manifest(folder, _manifest(job, recipe, source, quantized, found))
        if judgement and (failure := budget.failure(budget.check(found, _limits(job, recipe)))):
            raise failure


@dataclass(frozen=True, slots=True)
class Files:
    """What goes onto the device."""

    model: Path
    adapters: tuple[Path, ...]


def _pack(
    job: Job, source: Source, quantized: QuantizedCheckpoint, folder: Path, progress: Progress
) -> Files:
    """Write the container and its adapters; read every code back."""
    stage = f"packing {job.container.NAME}"
    progress(stage, 0, 2)
    (model,) = job.container.write(quantized, source.tokenizer, folder)
    adapters = []
    if source.mode == "separate" and source.adapters:
        (folder / "adapters").mkdir()
        for _, adapter in source.adapters:
            written = job.container.write_adapter(adapter, source.decoder, folder / "adapters")
            adapters.append(written)
    progress(stage, 1, 2)
    read_back = job.container.check(quantized, folder)
    if read_back.weights_digest != quantized.weights_digest:
        raise ValidationFailed(
            f"{model.name} does not hold the codes that were quantized",
            f"its digest is {read_back.weights_digest}, not {quantized.weights_digest}",
            "export again; if it stays, report it with the model's config.json",
        )
    progress(stage, 2, 2)
    return Files(model, tuple(adapters))


def _case(
    job: Job, source: Source, quantized: QuantizedCheckpoint, texts: Texts, files: Files
) -> Case:
    separate = source.mode == "separate"
    expected = oracle(source)
    return Case(
        file=files.model,
        adapter=files.adapters[0] if files.adapters else None,
        oracle=expected,
        codes=Oracle(
            quantized.folder,
            adapter=expected.adapter if separate else None,
            scale=expected.scale if separate else 1.0,
            quantized=True,
        ),
        tokenizer=source.tokenizer,
        texts=texts.judged,
        kv_cache=job.target.kv_cache,
        context=min(job.target.context_length, source.decoder.context_length),
        prompt_lengths=job.target.prompt_lengths,
        prompts=texts.prompts,
    )


def _report(
    job: Job,
    recipe: Recipe,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts,
    files: Files,
    judgement: Judgement | None,
) -> dict[str, Any]:
    layers = report.layer_rows(quantized.plan, quantized.errors, {})
    sizes = footprint(
        (files.model, *files.adapters),
        [files.model],
        quantized.plan.parameters,
        _memory(job, quantized, judgement),
        job.target.isa,
    )
    subject = report.Subject(
        model={"name": source.name, "version": recipe.version},
        target=job.target,
        container=job.container.NAME,
        runtime=RUNTIMES[job.container.NAME].version(),
        weights_digest=quantized.weights_digest,
        layers=layers,
        footprint=sizes.to_json(),
        limits=_limits(job, recipe),
        adapters=[
            {"name": entry.name, "kind": adapter.kind, "mode": source.mode, "recovery": None}
            for entry, adapter in source.adapters
        ],
        texts=texts.origins,
        samples=_samples(source, judgement),
        inputs=assembly.inputs(source, quantized),
        tools=assembly.tools(),
        findings=limits.findings(job.target, files.model.parent, sizes.download_bytes),
    )
    return report.build(subject, judgement, codes_equal=True)


def _memory(job: Job, quantized: QuantizedCheckpoint, judgement: Judgement | None) -> Memory:
    """What the target will hold in memory; the weights' part is predicted for its processor."""
    assert judgement is not None
    return judgement.measurements.memory


def _samples(source: Source, judgement: Judgement | None) -> list[dict[str, str]]:
    """Greedy text of oracle and artifact side by side."""
    if judgement is None:
        return []
    decode = source.tokenizer.decode
    return [
        {
            "prompt": prompt,
            "reference": decode(judgement.expected[prompt].tokens),
            "artifact": decode(generation.tokens),
        }
        for prompt, generation in judgement.golden.items()
    ]


def _limits(job: Job, recipe: Recipe) -> dict[str, Limit]:
    return budget.limits(job.target.budgets, recipe.budgets)


def _manifest(
    job: Job, recipe: Recipe, source: Source, quantized: QuantizedCheckpoint, found: dict[str, Any]
) -> dict[str, Any]:
    """Everything that `verify`, `check` and a device need to know, and nothing of this machine."""
    build, reason = job.container.minimum_runtime(
        source.decoder, source.tokenizer, source.mode == "separate"
    )
    return {
        "name": source.name,
        "version": recipe.version,
        "target": job.target.name,
        "container": job.container.NAME,
        "validated": found["validated"],
        "passed": found["passed"],
        "executed": found["executed"],
        "not_executed": found["not_executed"],
        "weights_digest": quantized.weights_digest,
        "float_digest": quantized.float_digest,
        "digests": {name: record.digest for name, record in quantized.records.items()},
        "plan": quantized.plan.to_json(),
        "config": quantized.config,
        "inputs": assembly.inputs(source, quantized),
        "recipe": recipe.to_json(),
        "tools": assembly.tools(),
        "minimum_runtime": {"runtime": "llama.cpp", "build": build, "reason": reason},
    }


def quantize(
    recipe: Recipe, output: Path, *, offline: bool = False, progress: Progress = _silent
) -> dict[str, Any]:
    """Write the quantized checkpoint of a recipe's model to `output`; returns its record."""
    source = open_source(recipe, offline=offline)
    plan = plan_of(recipe, source)
    texts = read_texts(recipe, source, plan, False, progress)
    quantized = _quantize(source, plan, texts.calibration, output, progress)
    return {
        "schema": "slimport.quantize/1",
        "name": quantized.name,
        "weights_digest": quantized.weights_digest,
        "float_digest": quantized.float_digest,
        "errors": dict(quantized.errors),
    }


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, and the codes in it against their digests.

    Raises:
        UsageError: no such folder.
        BadInput: a file or a code differs; its name.
    """
    manifest = bundle.verify(folder)
    container, decoder, plan = _contents(folder, manifest)
    grids = {choice.weight.name: choice.grid.name for choice in plan.quantized if choice.grid}
    digests = {
        name: weight.digest(name)
        for name, weight in container.read_back(folder, decoder, grids)
        if isinstance(weight, QuantizedTensor)
    }
    for name in grids:
        if digests.get(name) != manifest["digests"].get(name):
            raise _mismatch(folder, name, digests.get(name), manifest["digests"].get(name))
    found = weights_digest(digests)
    if found != manifest["weights_digest"]:
        raise _mismatch(folder, "all weights", found, manifest["weights_digest"])
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
    if name not in CONTAINERS:
        raise Unsupported(
            f"{folder} holds container {name}",
            f"this slimport reads {', '.join(CONTAINERS)}",
            "use the slimport that made it",
        )
    return CONTAINERS[name], decoder, plan


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
        BadInput: the bundle or its report is not readable.
    """
    manifest = bundle.read_manifest(folder)
    budget.require_validated(manifest)
    found = read_json(folder / "report" / "report.json")
    if target is not None:
        return budget.check(found, load_target(target).budgets)
    stated = {entry["metric"]: Limit(entry["limit"], entry["source"]) for entry in found["budgets"]}
    return budget.check(found, stated)


def report_of(folder: Path) -> dict[str, Any]:
    """The joined report and measurements of a bundle."""
    parts = folder / "report"
    return report.joined(read_json(parts / "report.json"), read_json(parts / "measurements.json"))


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
