"""Searching grids under limits: sizes, refusals, and exports that keep what they promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slimport import pipeline
from slimport.errors import Unsupported, UsageError
from slimport.quantize.sensitivity import Sensitivities
from slimport.quantize.windows import windows_of
from slimport.recipe import Recipe
from slimport.shipping import fit
from slimport.shipping.fit import Search, within_loss
from slimport.shipping.shipment import make_jobs
from slimport.shipping.source import Source, open_source


@pytest.fixture(scope="module")
def model(make_model: Any) -> Path:
    folder: Path = make_model("llama", hidden_size=256, intermediate_size=256)
    return folder


def search_of(model: Path, **given: Any) -> tuple[Search, Source]:
    recipe = Recipe().override(**{"model": str(model), "targets": ["android"], **given})
    source = open_source(recipe)
    return Search(recipe, source, make_jobs(recipe, source)), source


def losses_of(search: Search, seed: int = 0) -> dict[str, dict[str, float]]:
    """Invented ones: less with more bits, and of some weights much less than of others."""
    random = np.random.default_rng(seed)
    found = {}
    for name, choices in search.choices.items():
        factor = random.lognormal(-4, 2)
        found[name] = {
            c.grid.name: factor * 4.0 ** -c.grid.bits_per_weight(256) for c in choices if c.grid
        }
    return found


def device_bytes(search: Search, found: fit.Fit) -> int:
    return search.jobs[0].device_bytes(search.source, found.plan)


@pytest.mark.parametrize("size", ["330 kB", "400 kB", "600 kB"])
def test_the_bundle_keeps_its_limit_and_uses_it(size: str, model: Path) -> None:
    search, _ = search_of(model, device_bytes=size)
    found = search.find(losses_of(search))
    limit = search.recipe.fit.device_bytes
    assert limit is not None
    assert 0.97 * limit < device_bytes(search, found) <= limit
    assert found.sizes == {"android": device_bytes(search, found)}
    assert found.bound <= found.predicted * (1 + 1e-9)
    uniform = [point for point in found.uniform.values() if point.nbytes <= limit]
    assert not uniform or found.predicted <= min(point.loss for point in uniform) * (1 + 1e-6)
    losses = [point.loss for point in found.frontier]
    assert losses == sorted(losses, reverse=True)
    assert {choice.reason[:4] for choice in found.plan.quantized} == {"fit:"}


def test_every_target_keeps_the_limit_with_one_plan(model: Path) -> None:
    search, source = search_of(model, targets=["android", "ios"], device_bytes="700 kB")
    found = search.find(losses_of(search))
    grids = {choice.grid.name for choice in found.plan.quantized if choice.grid}
    assert grids <= {"int4-g32", "int8-row"}  # what GGUF and Core ML of iOS 18 both hold
    for job in search.jobs:
        assert job.device_bytes(source, found.plan) <= 700_000


def test_memory_is_kept(model: Path) -> None:
    loose, source = search_of(model, memory_bytes="20 MB")
    most = loose.find(losses_of(loose)).memory["android"]
    limit = most - 200_000
    search, _ = search_of(model, memory_bytes=f"{limit} B")
    found = search.find(losses_of(search))
    planned = search.jobs[0].memory(source, found.plan)
    assert planned is not None and planned.memory.total == found.memory["android"] <= limit


def test_the_smallest_size_is_named_where_nothing_fits(model: Path) -> None:
    search, _ = search_of(model, device_bytes="100 kB")
    with pytest.raises(Unsupported, match=r"no choice of grids fits 100 kB") as refused:
        search.find(losses_of(search))
    words = refused.value.cure.split()[2].removesuffix("MB")
    again, _ = search_of(model, device_bytes=f"{words} MB")
    assert device_bytes(again, again.find(losses_of(again))) <= float(words) * 1e6


def test_a_limit_on_the_loss_makes_the_smallest(model: Path) -> None:
    search, _ = search_of(model, kl_mean=0.01)
    losses = losses_of(search)
    found = search.find(losses)
    assert found.predicted <= 0.01
    tight = search_of(model, device_bytes=f"{device_bytes(search, found) - 2000} B")[0]
    assert tight.find(losses).predicted > 0.01
    with pytest.raises(Unsupported, match="keeps all limits"):
        search.find(losses, 1e-12)


def test_predictions_are_corrected_by_what_is_measured(model: Path) -> None:
    search, _ = search_of(model, kl_mean=0.01)
    losses, made = losses_of(search), []

    def solve(plan: Any) -> Any:
        lost = sum(losses[c.weight.name][c.grid.name] for c in plan.quantized if c.grid)
        made.append(SimpleNamespace(plan=plan, lost=1.7 * lost))
        return made[-1]

    found, checkpoint = within_loss(search, losses, 0.01, solve, lambda each: each.lost)
    assert checkpoint.plan == found.plan
    assert 0.8 * 0.009 < (found.measured or 0) <= 0.009
    assert len(made) <= 5


def test_patterns_of_the_recipe_stand(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    search, _ = search_of(model, device_bytes="400 kB", patterns={name: "float16"})
    found = search.find(losses_of(search))
    assert found.plan[name].grid is None and name not in search.choices


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"grids": ["int5-g32"]}, UsageError, "grid 'int5-g32'"),
        ({"targets": ["ios"], "grids": ["Q4_K"]}, Unsupported, "Q4_K"),
        ({"targets": ["android-gpu"], "memory_bytes": "1 GB"}, Unsupported, "cannot be planned"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    given: dict[str, Any], error: type[Exception], words: str, model: Path
) -> None:
    with pytest.raises(error, match=words):
        search_of(model, **{"device_bytes": "400 kB", **given})


def test_reward_models_are_refused(make_model: Any) -> None:
    with pytest.raises(Unsupported, match="reward model"):
        search_of(make_model("llama", reward=True), container="onnx", device_bytes="1 MB")


def test_sensitivities_are_kept_and_belong_to_their_model(
    model: Path, make_model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "s.json"
    given = {"device_bytes": "400 kB", "sensitivities": path, "grids": ["int4-g32", "int8-row"]}
    windows = windows_of(np.random.default_rng(0).integers(0, 400, (4, 32)).astype(np.int32))
    search, _ = search_of(model, **given)
    found = fit.losses_of(search, windows, lambda *stage: None)
    assert Sensitivities.read(path).losses == found
    more, _ = search_of(model, **{**given, "grids": ["Q6_K", "int4-g32", "int8-row"]})
    added = fit.losses_of(more, windows, lambda *stage: None)
    for name, row in found.items():
        assert row.items() < added[name].items()
    monkeypatch.setattr("slimport.quantize.sensitivity.measure", None)  # nothing is left to measure
    assert fit.losses_of(search, windows, lambda *stage: None) == added
    other = windows_of(windows.ids[:2])
    with pytest.raises(UsageError, match="not those of this export"):
        fit.losses_of(search, other, lambda *stage: None)


def test_an_export_keeps_its_size(model: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a little fox. " * 60)
    words = ["export", model, "--target", "android", "--calibration", tmp_path / "text.txt"]
    words += ["--fit", "700kB", "--fit-grid", "int4-g32", "--fit-grid", "int8-row"]
    done = run(*words, "--no-validate", "-o", tmp_path / "dist", "-q")
    assert done.code == 0, done.err
    assert "this plan" in done.out and "at most 700 kB" in done.out
    bundle = tmp_path / "dist" / "android"
    assert (bundle / "model.gguf").stat().st_size <= 700_000
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["recipe"]["fit"]["device_bytes"] == 700_000
    assert manifest["plan"]["preset"] == "fit"
    assert pipeline.verify(bundle)["weights_digest"] == manifest["weights_digest"]
    refused = run(*words, "--quantized", tmp_path, "-o", tmp_path / "dist", "-q")
    assert refused.code == 2 and "--quantized cannot be fitted" in refused.err


def test_a_dry_run_shows_the_plan_and_writes_nothing(model: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a little fox. " * 60)
    words = ["export", model, "--target", "android", "--calibration", tmp_path / "text.txt"]
    words += ["--fit", "700kB", "--fit-grid", "int4-g32", "--fit-grid", "int8-row", "--dry-run"]
    found = run(*words, "-o", tmp_path / "dist", "-q", "--json").json
    assert 680_000 < found["fit"]["device_bytes"]["android"] <= 700_000
    assert sum(found["jobs"][0]["files"].values()) == found["fit"]["device_bytes"]["android"]
    assert not (tmp_path / "dist").exists()


def test_verbs_that_do_not_search_say_so(model: Path, tmp_path: Path, run: Any) -> None:
    recipe = tmp_path / "slimport.toml"
    recipe.write_text(f'model = "{model}"\n[fit]\ndevice_bytes = "400 kB"\n')
    done = run("quantize", "--config", recipe, "-o", tmp_path / "q")
    assert done.code == 2 and "wants grids that fit" in done.err
    shown = run("inspect", "--config", recipe, "--json").json
    assert shown["fit"] == {"device_bytes": 400_000} and "plan" not in shown


def test_limits_are_budgets_of_the_bundle(model: Path) -> None:
    search, _ = search_of(model, device_bytes="400 kB", kl_mean=0.02)
    from slimport.shipping import shipment

    recipe = replace(search.recipe, budgets={"kl_mean": 0.5, "top1": 0.1})
    limits = shipment._limits(search.jobs[0], recipe)
    assert limits["device_bytes"].limit == 400_000
    assert limits["kl_mean"].limit == 0.02 and limits["top1"].limit == 0.1
