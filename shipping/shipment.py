"""One target of an export: from a quantized checkpoint to a finished bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import bundle
from ..architectures import weights
from ..errors import Unsupported, UsageError, ValidationFailed
from ..export.container import Base, Container, Deployment, Separate
from ..quantize.plan import Plan
from ..quantize.store import QuantizedCheckpoint
from ..quantize.windows import Windows
from ..recipe import Recipe
from ..targets import limits
from ..targets.target import Limit, Target, load_target
from ..validation import budget, conformance, report
from ..validation.footprint import footprint
from ..validation.judge import Case, Judgement, fitted, golden_json, judge
from ..validation.planned_memory import PlannedMemory, planned_memory
from ..validation.reward import RewardCase, RewardJudgement, judge_reward
from ..validation.runtime import Runtime, Scorer
from ..validation.runtimes.reference import Oracle
from . import assembly, containers, sdks
from .assembly import Files
from .source import Source
from .texts import Texts, oracle

Progress = Callable[[str, int, int], None]
_ADAPTERS = "adapters/"


class Fitted(Protocol):
    """What a search for the plan found, as fit.Fit."""

    def to_json(self) -> dict[str, Any]:
        """The key "fit" of report.json."""


@dataclass(frozen=True, slots=True)
class Job:
    """One target of an export: which container, and where the bundle will stand."""

    target: Target
    container: Container
    destination: Path
    deployment: Deployment

    @property
    def runtime(self) -> Runtime:
        """What judges the container."""
        return containers.load(self.container.NAME).runtime

    @property
    def scorer(self) -> Scorer:
        """What judges a reward model in the container."""
        scorer = containers.load(self.container.NAME).scorer
        assert scorer is not None, "plan_jobs refuses the others"
        return scorer

    def files(self, source: Source, plan: Plan) -> Files:
        """Those of the finished bundle."""
        predicted = self.predict(source, plan)
        paths = {
            name: self.destination / name for name in predicted if name not in self.container.PROOF
        }
        adapters = {name: path for name, path in paths.items() if name.startswith(_ADAPTERS)}
        base = {name: path for name, path in paths.items() if name not in adapters}
        return Files(tuple(base.values()), tuple(adapters.values()))

    def device_bytes(self, source: Source, plan: Plan) -> int:
        """Of everything that goes onto the device, as `predict` says."""
        predicted = self.predict(source, plan)
        return sum(size for name, size in predicted.items() if name not in self.container.PROOF)

    def memory(self, source: Source, plan: Plan) -> PlannedMemory | None:
        """That of the device at the target's context; None: this container's is not known."""
        sizes = self.container.tensor_bytes(source.decoder, plan)
        target = self.target
        given = (source.decoder, plan, sizes, target.context_length, target.kv_cache, target.isa)
        return planned_memory(self.container.NAME, *given)

    def predict(self, source: Source, plan: Plan) -> dict[str, int]:
        """{path in the bundle: bytes} of the model's files, FILE first, and of adapters."""
        given = (source.decoder, plan, source.tokenizer, source.name, self.deployment)
        files = self.container.predict(*given)
        base = Base.planned(source.decoder, plan, source.tokenizer, self.deployment)
        for adapter, _ in separate_adapters(source):
            predicted = self.container.predict_adapter(adapter, base)
            files |= {f"{_ADAPTERS}{name}": size for name, size in predicted.items()}
        return files


def separate_adapters(source: Source) -> tuple[Separate, ...]:
    """Those that stay beside the base."""
    if source.mode != "separate":
        return ()
    return tuple(Separate(adapter, entry.scale) for entry, adapter in source.adapters)


def make_job(target: Target, container: Container, source: Source, destination: Path) -> Job:
    """A job with the target's context as far as model and container go."""
    context = min(target.context_length, container.context_length(source.decoder))
    cache = container.kv_cache(target.kv_cache)
    separate = separate_adapters(source)
    changed = {name for each in separate for name in each.adapter.deltas}
    kinds = {weight.kind for weight in weights(source.decoder) if weight.name in changed}
    target = replace(target, context_length=context, kv_cache=cache)
    deployment = Deployment(context, frozenset(kinds), separate, target.hexagon, target.ios)
    return Job(target, container, destination, deployment)


def plan_jobs(recipe: Recipe, source: Source, plan: Plan) -> list[Job]:
    """Containers and destinations; everything that cannot be held exactly is refused here.

    Raises:
        UsageError, Unsupported: as `make_jobs`; a container that cannot hold the plan.
    """
    jobs = make_jobs(recipe, source)
    refuse_plan(jobs, source, plan)
    return jobs


def refuse_plan(jobs: Sequence[Job], source: Source, plan: Plan) -> None:
    """Raise Unsupported if a container cannot hold the plan exactly."""
    for job in jobs:
        job.container.refuse(source.decoder, plan, source.tokenizer)
        job.container.refuse_deployment(plan, job.deployment)


def make_jobs(recipe: Recipe, source: Source) -> list[Job]:
    """Containers and destinations of all targets.

    Raises:
        UsageError: no target, or two of one name.
        Unsupported: a container that is not there yet, or that cannot hold the adapters.
    """
    if not recipe.targets:
        raise UsageError(
            "no target to export for",
            "a bundle is made for a device profile",
            "give --target android, or set `targets` in slimport.toml",
        )
    budget.refuse_foreign(recipe.budgets, "reward" if source.decoder.reward else "language")
    jobs = []
    for name in recipe.targets:
        target = load_target(name)
        container = _container(target, recipe.container)
        if source.decoder.reward:
            _refuse_reward(container)
        for adapter, _ in separate_adapters(source):
            container.refuse_adapter(adapter)
        jobs.append(make_job(target, container, source, recipe.output / target.name))
    names = [job.target.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{names.count(name)} targets are called {name}",
                f"each would be written to {recipe.output / name}",
                "give it once, or rename your TOML file",
            )
    return jobs


def _container(target: Target, wanted: str | None) -> Container:
    for name in (wanted,) if wanted else target.containers:
        if name in containers.NAMES:
            return containers.load(name).container
    if wanted:
        sdks.refuse(wanted)
    preferred = wanted or ", ".join(target.containers)
    raise Unsupported(
        f"target {target.name}: container {preferred} is not there yet",
        f"slimport writes {', '.join(containers.NAMES)} so far",
        f"run it with --container {containers.NAMES[0]}",
    )


def _refuse_reward(container: Container) -> None:
    if containers.load(container.NAME).scorer is None:
        able = [name for name in containers.NAMES if containers.load(name).scorer]
        raise Unsupported(
            f"container {container.NAME} cannot hold a reward model",
            "slimport does not make its runtime score texts",
            f"write one that can: --container {able[0]}",
        )


def build(
    job: Job,
    recipe: Recipe,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts,
    work: Path,
    progress: Progress,
    fitted: Fitted | None = None,
) -> None:
    """One bundle, from packing to the swap; a broken budget leaves it at NAME.failed.

    `fitted`: what a search for the plan found, for the report.
    """
    job = calibrated(job, texts)
    with bundle.building(job.destination) as folder:
        files = pack(job, source, quantized, folder, progress)
        assembly.copy_licenses(source, texts.files, folder)
        if not texts.digests:
            if recipe.pre is not None:  # a claim of the user's, and quick to check
                conformance.check(source.tokenizer, files.model, job.runtime)
            assembly.write_tokenizer_notes(source, None, folder)
            assembly.write_readme(
                job.container, job.target, source, quantized.plan, None, files, folder
            )
            bundle.write_manifest(folder, _manifest(job, recipe, source, quantized, texts, None))
            return
        texts = fitted_texts(job, texts, files)
        judgement, golden = judged(job, source, quantized, texts, files, work, progress)
        found = report_on(job, recipe, source, quantized, texts, files, judgement, quantized.errors)
        if fitted is not None:
            found["fit"] = fitted.to_json()
        assembly.write_tokenizer_notes(source, golden, folder)
        chats = texts.pairs["held_out"].chats if texts.pairs else None
        assembly.write_readme(
            job.container, job.target, source, quantized.plan, found, files, folder, chats
        )
        report.write(folder / "report", found, report.measurements(judgement.measurements))
        bundle.write_manifest(folder, _manifest(job, recipe, source, quantized, texts, found))
        if failure := budget.failure(found):
            raise failure


def pack(
    job: Job, source: Source, quantized: QuantizedCheckpoint, folder: Path, progress: Progress
) -> Files:
    """Write the container and its adapters; read every code back."""
    stage = f"packing {job.container.NAME}"
    progress(stage, 0, 2)
    written = job.container.write(quantized, source.tokenizer, folder, job.deployment)
    adapters = []
    if source.mode == "separate" and source.adapters:
        (folder / _ADAPTERS).mkdir()
        base = Base.of(quantized, source.tokenizer, job.deployment)
        for entry, adapter in source.adapters:
            path = job.container.write_adapter(adapter, base, folder / _ADAPTERS, entry.scale)
            job.container.check_adapter(path, adapter, base, entry.scale)
            adapters.append(path)
    progress(stage, 1, 2)
    read_back = job.container.check(quantized, folder)
    if read_back.weights_digest != quantized.weights_digest:
        raise ValidationFailed(
            f"{job.container.FILE} does not hold the codes that were quantized",
            f"its digest is {read_back.weights_digest}, not {quantized.weights_digest}",
            "export again; if it stays, report it with the model's config.json",
        )
    progress(stage, 2, 2)
    proof = {folder / name for name in job.container.PROOF}
    return Files(tuple(path for path in written if path not in proof), tuple(adapters))


def calibrated(job: Job, texts: Texts) -> Job:
    """The job with the text that its container observes activations on, if it does."""
    if not job.container.CALIBRATED or not isinstance(texts.calibration, Windows):
        return job
    return replace(job, deployment=replace(job.deployment, calibration=texts.calibration))


def fitted_texts(job: Job, texts: Texts, files: Files) -> Texts:
    """As much of the texts as the runtime can judge; where that is less, their origins say so."""
    effort = job.runtime.effort(files.model)
    judged = {name: fitted(windows, effort) for name, windows in texts.judged.items()}
    origins = dict(texts.origins)
    for name, windows in judged.items():
        if (count := windows.ids.size) < (whole := texts.judged[name].ids.size):
            origins[name] += f", {count} of {whole} tokens: as many as a slow runtime can judge"
    return replace(texts, judged=judged, origins=origins)


def judged(
    job: Job,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts,
    files: Files,
    work: Path,
    progress: Progress,
) -> tuple[Judgement | RewardJudgement, dict[str, Any]]:
    """What was found of a finished container, and golden.json."""
    separate = source.mode == "separate"
    expected = oracle(source)
    codes = Oracle(quantized.folder, quantized=True, reward=expected.reward)
    if separate and source.adapters:
        entry, _ = source.adapters[0]
        codes = replace(codes, adapter=entry.path, scale=entry.scale)
    if source.decoder.reward:
        scored = judge_reward(
            RewardCase(
                file=files.model,
                oracle=expected,
                codes=codes,
                tokenizer=source.tokenizer,
                pairs=texts.pairs,
                context=job.target.context_length,
                prompt_lengths=job.target.prompt_lengths,
            ),
            job.scorer,
            progress,
        )
        return scored, scored.golden_json()
    case = Case(
        file=files.model,
        adapter=files.adapters[0] if files.adapters else None,
        oracle=expected,
        codes=codes,
        tokenizer=source.tokenizer,
        texts=texts.judged,
        kv_cache=job.target.kv_cache,
        context=job.target.context_length,
        prompt_lengths=job.target.prompt_lengths,
        prompts=texts.prompts,
        beside=_beside(source, quantized, files) if separate else (),
    )
    judgement = judge(case, job.runtime, work, progress)
    return judgement, golden_json(judgement, case)


def _beside(
    source: Source, quantized: QuantizedCheckpoint, files: Files
) -> list[tuple[Path | None, Oracle]]:
    """The base alone and all adapters but the first, each with the codes."""
    found: list[tuple[Path | None, Oracle]] = [(None, Oracle(quantized.folder, quantized=True))]
    for (entry, _), path in zip(source.adapters[1:], files.adapters[1:], strict=True):
        codes = Oracle(quantized.folder, adapter=entry.path, scale=entry.scale, quantized=True)
        found.append((path, codes))
    return found


def report_on(
    job: Job,
    recipe: Recipe,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts,
    files: Files,
    judgement: Judgement | RewardJudgement,
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """report.json; `errors` are relative RMSE by weight."""
    runtime = job.runtime
    accelerator = runtime.accelerator(files.model)
    sizes = footprint(
        (*files.base, *files.adapters),
        files.base,
        runtime.memory_on(files.model, job.target.isa, judgement.measurements.memory),
        job.target.isa,
        runtime.PREDICTED,
    )
    subject = report.Subject(
        model={"name": source.name, "version": recipe.version},
        target=job.target,
        container=job.container.NAME,
        runtime=runtime.version(),
        weights_digest=quantized.weights_digest,
        layers=report.layer_rows(
            quantized.plan, errors, job.container.tensor_bytes(quantized.decoder, quantized.plan)
        ),
        footprint=sizes.to_json(),
        limits=_limits(job, recipe),
        adapters=[
            {"name": entry.name, "kind": adapter.kind, "mode": source.mode, "recovery": None}
            for entry, adapter in source.adapters
        ],
        texts=texts.origins,
        samples=_samples(source, judgement) if isinstance(judgement, Judgement) else (),
        inputs=_inputs(job, source, quantized, texts),
        tools=assembly.tools(job.container),
        findings=[
            *limits.findings(job.target, files.model.parent, sizes.download_bytes),
            *(accelerator.findings if accelerator else ()),
        ],
        not_judged=[
            *runtime.UNKNOWN,
            *(
                f"adapter {path.stem}: its texts; only {files.adapters[0].stem} was judged on them"
                for path in files.adapters[1:]
            ),
        ],
        accelerator=accelerator.to_json() if accelerator else None,
        fallbacks=quantized.plan.fallbacks,
        notes=assembly.notes(job.container, source, quantized.plan),
        executes=runtime.EXECUTES,
    )
    return report.build(subject, judgement, codes_equal=True)


def _samples(source: Source, judgement: Judgement) -> list[dict[str, str]]:
    """Greedy text of oracle and artifact side by side."""
    decode = source.tokenizer.decode
    return [
        {
            "prompt": prompt,
            "reference": decode(judgement.expected[prompt].tokens),
            "artifact": decode(generation.tokens),
        }
        for prompt, generation in judgement.golden.items()
    ]


def _inputs(
    job: Job, source: Source, quantized: QuantizedCheckpoint, texts: Texts
) -> dict[str, Any]:
    """As assembly.inputs, with the text that activations were observed on."""
    found = assembly.inputs(source, quantized, texts.digests)
    observed = job.deployment.calibration
    return found if observed is None else found | {"activations": observed.digest}


def _limits(job: Job, recipe: Recipe) -> dict[str, Limit]:
    return budget.limits(job.target.budgets, {**recipe.budgets, **recipe.fit.limits})


def _manifest(
    job: Job,
    recipe: Recipe,
    source: Source,
    quantized: QuantizedCheckpoint,
    texts: Texts,
    found: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that `verify`, `check` and a device need to know, and nothing of this machine.

    `found` is the report; None: nothing was judged.
    """
    minimum = job.container.minimum_runtime(
        source.decoder, quantized.plan, source.tokenizer, source.mode == "separate"
    )
    return {
        "name": source.name,
        "version": recipe.version,
        "target": job.target.name,
        "profile": job.target.to_json(),
        "container": job.container.NAME,
        "validated": found is not None and job.runtime.EXECUTES,
        **({} if job.runtime.EXECUTES else {"judged": found is not None}),
        "passed": found["passed"] if found else False,
        "executed": found["executed"] if found else [],
        "not_executed": found["not_executed"] if found else [report.not_executed(job.target)],
        "weights_digest": quantized.weights_digest,
        "float_digest": quantized.float_digest,
        "digests": {name: record.digest for name, record in quantized.records.items()},
        "errors": dict(quantized.errors),
        "plan": quantized.plan.to_json(),
        "fallbacks": quantized.plan.fallbacks,
        "notes": assembly.notes(job.container, source, quantized.plan),
        "config": _public(quantized.config),
        "inputs": _inputs(job, source, quantized, texts),
        "recipe": recipe.to_json(),
        "tools": assembly.tools(job.container),
        "minimum_runtime": minimum._asdict(),
        **_session(job, found),
    }


def _session(job: Job, found: dict[str, Any] | None) -> dict[str, Any]:
    """The settings under which the files were judged; nothing where there are none."""
    stated = job.runtime.SESSION
    return {"session_options": dict(stated)} if found and stated else {}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without private keys: `_name_or_path` is a local path, and none has meaning."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
