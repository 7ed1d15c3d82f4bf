"""Budgets: what a report says, beside what the target allows.

The speed of this machine is no metric here: it says nothing about a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from ..errors import BudgetExceeded, SlimportError, UsageError, ValidationFailed
from ..settings import METRICS, format_size
from ..targets.target import Limit

_SHARES = ("npu_nodes", "npu_weight_bytes", "gpu_nodes", "gpu_weight_bytes")


@dataclass(frozen=True, slots=True)
class Budget:
    """One metric beside its limit; `value` None: the report lacks it, which is never ok."""

    metric: str
    limit: float
    value: float | None
    ok: bool
    unit: str
    source: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def limits(targeted: Mapping[str, Limit], own: Mapping[str, float]) -> dict[str, Limit]:
    """The target's limits with those of the recipe in their place."""
    return {**targeted, **{metric: Limit(limit, "recipe") for metric, limit in own.items()}}


def check(report: Mapping[str, Any], limits: Mapping[str, Limit]) -> list[Budget]:
    """Compare the figures of a report.json with limits, in the order of settings.METRICS.

    A target's limits are for language models and reward models: each has its own metrics.
    """
    values, kind = measured(report), report.get("kind", "language")
    return [
        _budget(name, limits[name], values)
        for name, metric in METRICS.items()
        if name in limits and metric.of in (None, kind)
    ]


def refuse_foreign(own: Mapping[str, float], kind: str) -> None:
    """Raise UsageError for a limit of a recipe on a metric that this kind of model has not."""
    for name in own:
        if METRICS[name].of not in (None, kind):
            raise UsageError(
                f"a budget for {name}, which no {kind} model has",
                f"it is a figure of {METRICS[name].of} models, so the limit would be ignored",
                f"remove {name} from [budgets]",
            )


def measured(report: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of settings.METRICS that a report.json holds.

    Sums of memory count a weight twice that is both mapped and repacked: an upper bound.
    """
    footprint = _table(report, "footprint")
    accuracy = _table(_table(report, "accuracy"), "held_out")
    preference = _table(_table(report, "preference"), "held_out")
    memory = _table(footprint, "memory")
    anonymous = ["repacked", "kv_cache", "compute", *(["adapter"] if "adapter" in memory else [])]
    found = {
        **{key: footprint.get(key) for key in ("device_bytes", "download_bytes", "model_bytes")},
        **{key: accuracy.get(key) for key in ("kl_mean", "top1")},
        **{key: preference.get(key) for key in ("score_error", "pair_agreement")},
        **{key: _table(report, "accelerator").get(key) for key in _SHARES},
        "memory_bytes": _total(memory, ("mapped", *anonymous)),
        "anonymous_bytes": _total(memory, anonymous),
        "ppl_ratio": ratio(accuracy),
    }
    return {metric: value for metric, value in found.items() if _is_number(value)}


def ratio(accuracy: Mapping[str, Any]) -> float | None:
    """Perplexity of the artifact over that of the reference."""
    reference, artifact = accuracy.get("ppl_reference"), accuracy.get("ppl")
    if not (_is_number(reference) and _is_number(artifact) and reference):
        return None
    return float(artifact / reference)


def require_validated(manifest: Mapping[str, Any]) -> None:
    """Refuse a bundle that was never judged.

    Raises:
        ValidationFailed: its manifest says neither "validated": true nor, of a file that nothing
            executes here, "judged": true.
    """
    if manifest.get("validated") is not True and manifest.get("judged") is not True:
        raise ValidationFailed(
            "the bundle was not validated",
            "it was exported with --no-validate, so its accuracy and memory are unknown",
            "export it again without --no-validate",
        )


def failure(report: Mapping[str, Any]) -> SlimportError | None:
    """Why a bundle with this report does not ship: broken budgets, or what its platform refuses.

    ValidationFailed if accuracy is among it, else BudgetExceeded.
    """
    broken = [Budget(**entry) for entry in report["budgets"] if not entry["ok"]]
    refused = [entry for entry in report["findings"] if entry["level"] == "refused"]
    words = "; ".join(
        [*(budget.message for budget in broken), *(entry["message"] for entry in refused)]
    )
    if refused and not broken:
        return BudgetExceeded(
            words,
            f"the platform or its store would refuse the bundle ({refused[0]['source']})",
            "build what is named as the platform asks, and export again",
        )
    if not broken:
        return None
    if any(budget.metric in _SHARES for budget in broken):
        return ValidationFailed(
            words,
            "a part of the model would run on the phone's CPU, and every token would wait for it",
            "report it with the model's config.json; --container gguf runs all of it on the CPU",
        )
    if any(budget.unit != "bytes" for budget in broken):
        return ValidationFailed(
            words,
            "the artifact lost more accuracy than its target allows",
            "take a finer preset or gptq, or raise the limit under [budgets] in slimport.toml",
        )
    return BudgetExceeded(
        words,
        "the bundle is larger than its target allows",
        "take a smaller preset or model, or raise the limit under [budgets] in slimport.toml",
    )


def _budget(metric: str, limit: Limit, values: Mapping[str, float]) -> Budget:
    kind = METRICS[metric]
    value = values.get(metric)
    if value is None:
        ok, message = False, f"{metric} is not in the report"
    else:
        ok = value >= limit.limit if kind.at_least else value <= limit.limit
        word = "at least" if kind.at_least else "at most"
        shown, bound = _in_words(value, kind.unit), _in_words(limit.limit, kind.unit)
        message = f"{metric} is {shown}, {'' if ok else 'it must be '}{word} {bound}"
    return Budget(metric, limit.limit, value, ok, kind.unit, limit.source, message)


def _in_words(value: float, unit: str) -> str:
    return format_size(value) if unit == "bytes" else f"{value:.4g}"


def _table(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = parent.get(key)
    return found if isinstance(found, Mapping) else {}


def _total(memory: Mapping[str, Any], parts: Sequence[str]) -> float | None:
    values = [memory.get(part) for part in parts]
    numbers = [value for value in values if _is_number(value)]
    return sum(numbers) if len(numbers) == len(parts) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
