"""Budgets: what is missing, not a number or over its limit is never ok."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from slimport.errors import BudgetExceeded, SlimportError, ValidationFailed
from slimport.settings import METRICS
from slimport.targets.target import Limit, load_target
from slimport.validation.budget import check, failure, limits, measured, require_validated

REPORT: dict[str, Any] = {
    "accuracy": {"held_out": {"kl_mean": 0.02, "top1": 0.93, "ppl_reference": 10.0, "ppl": 10.5}},
    "footprint": {
        "device_bytes": 3_000_000,
        "download_bytes": 2_000_000,
        "model_bytes": 2_500_000,
        "memory": {"mapped": 1000, "repacked": 200, "kv_cache": 30, "compute": 4},
    },
}


def test_every_metric_is_measured() -> None:
    assert measured(REPORT) == {
        "device_bytes": 3_000_000,
        "download_bytes": 2_000_000,
        "model_bytes": 2_500_000,
        "memory_bytes": 1234,
        "anonymous_bytes": 234,
        "kl_mean": 0.02,
        "top1": 0.93,
        "ppl_ratio": 1.05,
    }
    npu = {"npu_nodes": 1.0, "npu_weight_bytes": 0.5}
    gpu = {"gpu_nodes": 1.0, "gpu_weight_bytes": 0.5}
    for shares in (npu, gpu):
        assert measured({**REPORT, "accelerator": shares}) == measured(REPORT) | shares
    reward = {"score_error": 0.1, "pair_agreement": 0.96}
    scored = {**REPORT, "accuracy": {}, "preference": {"held_out": reward}}
    assert reward.items() <= measured(scored).items()
    assert measured(REPORT).keys() | npu.keys() | gpu.keys() | reward.keys() == METRICS.keys()


def test_what_the_cpu_would_run_is_a_failure() -> None:
    report = {**REPORT, "accelerator": {"npu_nodes": 0.99, "npu_weight_bytes": 1.0}}
    wanted = {metric: Limit(1.0, "here") for metric in ("npu_nodes", "npu_weight_bytes")}
    budgets = [budget.to_json() for budget in check(report, wanted)]
    assert [budget["ok"] for budget in budgets] == [False, True]
    broken = failure({**report, "budgets": budgets, "findings": []})
    assert isinstance(broken, ValidationFailed) and "npu_nodes is 0.99" in broken.what
    assert "phone's CPU" in broken.why
    missing = check(REPORT, wanted)
    assert not any(budget.ok for budget in missing)  # a report without them never passes


def test_a_separate_adapter_is_anonymous_memory() -> None:
    memory = {**REPORT["footprint"]["memory"], "adapter": 5000}
    found = measured({**REPORT, "footprint": {**REPORT["footprint"], "memory": memory}})
    assert (found["memory_bytes"], found["anonymous_bytes"]) == (6234, 5234)


@pytest.mark.parametrize(
    ("metric", "limit", "ok"),
    [
        ("device_bytes", 3_000_000, True),
        ("device_bytes", 2_999_999, False),
        ("memory_bytes", 1233, False),
        ("kl_mean", 0.02, True),
        ("kl_mean", 0.0199, False),
        ("top1", 0.93, True),
        ("top1", 0.94, False),
        ("ppl_ratio", 1.04, False),
    ],
)
def test_limits_hold_up_to_the_value_itself(metric: str, limit: float, ok: bool) -> None:
    (budget,) = check(REPORT, {metric: Limit(limit, "here")})
    assert (budget.metric, budget.limit, budget.ok) == (metric, limit, ok)
    assert budget.value == measured(REPORT)[metric]
    assert ("it must be" in budget.message) is not ok
    assert budget.to_json()["source"] == "here"


@pytest.mark.parametrize("metric", METRICS)
def test_a_missing_metric_is_never_ok(metric: str) -> None:
    kind = {"kind": "reward"} if METRICS[metric].of == "reward" else {}
    for report in ({}, {"footprint": None, "accuracy": []}, {"footprint": {"memory": {}}}):
        (budget,) = check({**report, **kind}, {metric: Limit(1e12, "x")})
        assert not budget.ok and budget.value is None
        assert budget.message == f"{metric} is not in the report"


@pytest.mark.parametrize("value", [float("nan"), None, "0.01", True])
def test_a_value_that_is_no_number_is_never_ok(value: Any) -> None:
    report = copy.deepcopy(REPORT)
    report["accuracy"]["held_out"]["kl_mean"] = value
    (budget,) = check(report, {"kl_mean": Limit(0.1, "x")})
    assert not budget.ok and budget.value is None


def test_one_missing_part_of_memory_makes_the_sum_unknown() -> None:
    report = copy.deepcopy(REPORT)
    del report["footprint"]["memory"]["compute"]
    assert not measured(report).keys() & {"memory_bytes", "anonymous_bytes"}


def test_the_recipe_stands_above_the_target() -> None:
    both = limits(load_target("android").budgets, {"kl_mean": 0.01})
    assert both["kl_mean"] == Limit(0.01, "recipe")
    assert both["top1"] == load_target("android").budgets["top1"]
    broken = [budget.metric for budget in check(REPORT, both) if not budget.ok]
    assert broken == ["kl_mean"]


def test_failure_is_the_worst_of_the_broken() -> None:
    def of(findings: list[dict[str, str]], **limits: Limit) -> SlimportError | None:
        budgets = [one.to_json() for one in check(REPORT, limits)]
        return failure({"budgets": budgets, "findings": findings})

    size, accuracy = Limit(1, "x"), Limit(0.001, "x")
    small = {"level": "refused", "message": "a.so has 4 KB pages", "source": "Android"}
    warning = {"level": "warning", "message": "large", "source": "Play"}
    assert of([warning], kl_mean=Limit(0.1, "x")) is None
    refused = of([small], kl_mean=Limit(0.1, "x"))
    assert isinstance(refused, BudgetExceeded) and "a.so has 4 KB pages" in refused.what
    assert "the platform or its store" in refused.why
    only_size = of([], model_bytes=size)
    assert isinstance(only_size, BudgetExceeded) and only_size.exit_code == 3
    assert "model_bytes is 2.50 MB, it must be at most 1 B" in only_size.what
    both = of([small], model_bytes=size, kl_mean=accuracy)
    assert isinstance(both, ValidationFailed) and both.exit_code == 4
    assert "model_bytes" in both.what and "kl_mean" in both.what


def test_no_metric_is_a_speed() -> None:
    assert not [metric for metric in METRICS if "tps" in metric or metric.endswith("_s")]


@pytest.mark.parametrize(
    "manifest",
    [{}, {"validated": False}, {"validated": "yes"}, {"validated": False, "judged": False}],
)
def test_an_unvalidated_bundle_is_refused(manifest: dict[str, Any]) -> None:
    with pytest.raises(ValidationFailed, match="not validated"):
        require_validated(manifest)
    require_validated({"validated": True})
    require_validated({"validated": False, "judged": True})  # nothing executes such a file here
