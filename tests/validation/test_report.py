"""report.json keeps its contract; page, Markdown and JUnit show its values and no others."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from slimport import bundle
from slimport.architectures import decoder_config
from slimport.quantize.plan import Plan, make_plan
from slimport.shipping import fit
from slimport.targets.limits import Finding
from slimport.targets.target import load_target
from slimport.validation import budget, page, plots, preference, report, summary
from slimport.validation.conformance import Conformance
from slimport.validation.divergence import HISTOGRAM_EDGES, Divergence
from slimport.validation.judge import Judgement
from slimport.validation.reward import RewardJudgement
from slimport.validation.runtime import Measurements, Memory, Speed

TESTS = Path(__file__).parents[1]
SAMPLE = json.loads((TESTS / "data/report_sample.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((TESTS.parent / "docs/report.schema.json").read_text(encoding="utf-8"))
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def divergence(mean: float, top1: float = 0.93) -> Divergence:
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    counts[0], counts[20], counts[28] = 3, 5, 2
    tails = (mean / 2, mean * 5, mean * 9, mean * 20)
    return Divergence(mean, *tails, None, top1, 10.0, 10.5, None, None, 10, tuple(counts))


@pytest.fixture
def subject() -> report.Subject:
    plan = make_plan(decoder_config(CONFIG))
    errors = {c.weight.name: 0.08 for c in plan.choices if c.grid}
    target = load_target("galaxy-s24")
    return report.Subject(
        model={"name": "tiny", "version": None},
        target=target,
        container="gguf",
        runtime="llama.cpp b1",
        weights_digest="sha256:" + "0" * 64,
        layers=report.layer_rows(plan, errors, {"model.embed_tokens.weight": 6528}),
        footprint={
            "device_bytes": 3000,
            "download_bytes": 2000,
            "model_bytes": 2500,
            "memory": {"mapped": 1000, "repacked": 200, "kv_cache": 30, "compute": 4},
        },
        limits=budget.limits(target.budgets, {}),
        texts={"held_out": "sampled from the full-precision model"},
        tools={"slimport": "0.1.0"},
    )


@pytest.fixture
def judgement() -> Judgement:
    speed = (Speed(100, 0.5, 200.0, 20.0, 1.5),)
    return Judgement(
        accuracy={"held_out": divergence(0.02), "out_of_distribution": divergence(0.05)},
        quantization=divergence(0.019),
        runtime=divergence(1e-5),
        graph=None,
        conformance=Conformance(61, (), (), ()),
        measurements=Measurements(speed, Memory(1, 2, 3, 4), 11, 12),
        golden={},
        expected={},
    )


@pytest.fixture
def scored(judgement: Judgement) -> RewardJudgement:
    """Of a reward model: two pairs, one of them in another order."""
    agreement = preference.compare([2.0, 1.0, 0.5, 0.4], [1.9, 1.2, 0.5, 0.6])
    speed = (Speed(100, 0.5, 200.0, None, 0.5), Speed(200, 1.0, 200.0, None, 1.0))
    return RewardJudgement(
        preference={"held_out": agreement, "out_of_distribution": agreement},
        quantization=agreement,
        runtime=agreement,
        graph=1e-7,
        conformance=judgement.conformance,
        measurements=replace(judgement.measurements, speed=speed),
        golden=[((1, 2), 1.9)],
    )


# ---- the contract ----


def violations(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Where `value` breaks `schema`: the part of JSON Schema that report.schema.json uses."""
    if "$ref" in schema:
        return violations(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    wanted = schema.get("type", [])
    wanted = wanted if isinstance(wanted, list) else [wanted]
    is_bool = isinstance(value, bool) and "boolean" not in wanted
    if wanted and (is_bool or not any(isinstance(value, types[name]) for name in wanted)):
        return [f"{where} is {value!r}, not {wanted}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{where} is {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where} is {value!r}")
    if isinstance(value, dict):
        found += [f"{where} lacks {key}" for key in schema.get("required", []) if key not in value]
        rest = schema.get("additionalProperties", {})
        for key, part in value.items():
            found += violations(part, schema.get("properties", {}).get(key, rest), f"{where}.{key}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            found += violations(part, schema.get("items", {}), f"{where}.{index}")
    return found


def test_the_sample_and_what_is_built_keep_the_schema(
    subject: report.Subject, judgement: Judgement, scored: RewardJudgement
) -> None:
    for built in (
        SAMPLE["report"],
        report.build(subject, judgement, codes_equal=True),
        report.build(subject, scored, codes_equal=True),
    ):
        assert violations(built, SCHEMA) == []
        # Additions go into the schema too; what is on an NPU is absent for a CPU's container.
    assert set(built) | {"accelerator", "fit"} == set(SCHEMA["properties"])


def test_the_schema_check_can_fail() -> None:
    broken = copy.deepcopy(SAMPLE["report"])
    broken["schema"] = "slimport.report/2"
    broken["footprint"]["device_bytes"] = "many"
    del broken["accuracy"]["held_out"]["top1"]
    assert violations(broken, SCHEMA) == [
        "$.accuracy.held_out lacks top1",
        "$.footprint.device_bytes is 'many', not ['integer']",
        "$.schema is 'slimport.report/2'",
    ]


def test_a_reward_model_has_scores_and_budgets_of_its_own(
    subject: report.Subject, scored: RewardJudgement
) -> None:
    built = report.build(subject, scored, codes_equal=True)
    assert (built["kind"], built["accuracy"]) == ("reward", {})
    assert built["preference"]["held_out"]["pair_agreement"] == 0.5
    assert built["errors"]["graph"] == {"score_max": 1e-7}
    metrics = {one["metric"]: one["ok"] for one in built["budgets"]}
    assert metrics["pair_agreement"] is False and "score_error" in metrics
    assert not {"kl_mean", "top1"} & metrics.keys()
    broken = budget.failure(built)
    assert broken is not None and broken.exit_code == 4
    words = summary.markdown(built)
    assert "| pairs in the same order, held out | 50.00% |" in words


def test_the_page_of_a_reward_model_shows_its_scores(
    subject: report.Subject, scored: RewardJudgement
) -> None:
    joined = report.joined(
        report.build(subject, scored, codes_equal=True), report.measurements(scored.measurements)
    )
    html = page.render(joined)
    for path in ("pair_agreement", "score_rmse", "margins.1.1", "accuracy_reference"):
        assert f'data-path="preference.held_out.{path}"' in html
    assert "KL" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert "1 of them of the same sign in both" in html


def test_build(subject: report.Subject, judgement: Judgement) -> None:
    built = report.build(subject, judgement, codes_equal=True)
    assert built["passed"]
    assert built["accuracy"]["held_out"]["kl_mean"] == 0.02
    assert built["accuracy"]["held_out"]["ppl_ratio"] == 1.05
    assert built["errors"] == {
        "quantization": {"kl_mean": 0.019},
        "file": {"codes_equal": True},
        "runtime": {"kl_mean": 1e-5},
    }
    assert built["footprint"]["memory_bytes"] == 1234
    assert built["footprint"]["anonymous_bytes"] == 234
    assert "llama.cpp b1" in built["executed"][0] and "Galaxy S24" in built["not_executed"][0]
    assert [one["metric"] for one in built["budgets"]] == [
        "device_bytes",
        "download_bytes",
        "memory_bytes",
        "anonymous_bytes",
        "kl_mean",
        "top1",
    ]


def test_sizes_worked_by_hand(subject: report.Subject) -> None:
    """Two layers: q, o 64x64; k, v 32x64; gate, up 128x64; down 64x128; int4-g32 is 4.5 bits."""
    groups = {group["group"]: group for group in report.size_by_group(subject.layers)}
    assert groups["attention"]["weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert groups["attention"]["bytes"] == 2 * (2 * 64 * 64 + 2 * 32 * 64) * 4.5 / 8
    assert groups["feed-forward"]["bytes"] == 2 * 3 * 64 * 128 * 4.5 / 8
    assert groups["embedding"]["bytes"] == 6528  # as the container states: int8-row in Q8_0
    assert groups["head"]["bytes"] == 96 * (64 + 2)
    assert groups["norms"]["bytes"] == 5 * 64 * 4
    assert groups["embedding"]["bits_per_weight"] == 8.5


@pytest.mark.parametrize("part", ["codes", "budget", "refused"])
def test_one_failed_check_fails_the_report(
    subject: report.Subject, judgement: Judgement, part: str
) -> None:
    if part == "budget":
        judgement.accuracy["held_out"] = divergence(0.02, top1=0.5)
    if part == "refused":
        object.__setattr__(subject, "findings", [Finding("refused", "4 KB pages", "Play")])
    built = report.build(subject, judgement, part != "codes")
    assert not built["passed"]
    text = page.render(report.joined(built, report.measurements(judgement.measurements)))
    assert "Failed:" in text and "Passed:" not in text
    assert "FAILED" in summary.markdown(built)


def test_measurements_name_no_host(judgement: Judgement) -> None:
    measured = report.measurements(judgement.measurements)
    assert set(measured) == {
        "schema",
        "machine",
        "date",
        "speed",
        "memory",
        "rss_anon",
        "rss_file",
    }
    assert measured["speed"][0]["ttft_s"] == 0.5 and measured["rss_anon"] == 11
    assert report.platform.node() not in measured["machine"].split(", ")


def test_write(tmp_path: Path, subject: report.Subject, judgement: Judgement) -> None:
    built = report.build(subject, judgement, codes_equal=True)
    measured = report.measurements(judgement.measurements)
    report.write(tmp_path / "report", built, measured)
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["junit.xml", "measurements.json", "report.html", "report.json", "summary.md"]
    assert json.loads((tmp_path / "report/report.json").read_bytes()) == built
    assert bundle.UNLISTED == {"report/measurements.json", "report/report.html"}
    once = {name: (tmp_path / "report" / name).read_bytes() for name in ("junit.xml", "summary.md")}
    report.write(tmp_path / "report", built, report.measurements(judgement.measurements))
    for name, content in once.items():
        assert (tmp_path / "report" / name).read_bytes() == content


# ---- the page ----


class Figures(HTMLParser):
    """Every (path, exact value, shown text) of a page, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any, str | None]] = []
        self.loads: list[str] = []
        self._open: tuple[str, Any] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [
            f"{tag} {key}" for key in given if key in ("src", "href", "srcset", "action")
        ]
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.loads.append(tag)
        path = given.get("data-path")
        if path and tag == "data":
            self._open = path, json.loads(given["value"] or "")
        elif path:
            self.found.append((path, json.loads(given["data-value"] or ""), None))

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found.append((*self._open, data))
            self._open = None


def figures(html: str) -> Figures:
    parser = Figures()
    parser.feed(html)
    return parser


def at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01, "ms": 1e-3, "s": 1, "": 1}


@pytest.fixture(scope="module")
def joined() -> dict[str, Any]:
    return report.joined(SAMPLE["report"], SAMPLE["measurements"])


def test_every_figure_is_its_json_value(joined: dict[str, Any]) -> None:
    found = figures(page.render(joined)).found
    assert len(found) > 500
    for path, exact, shown in found:
        value = at(joined, path)
        assert exact == value and type(exact) is type(value), path
        if shown is None or isinstance(value, bool):
            continue
        match = re.fullmatch(r"(-?[\d.,]+(?:e-?\d+)?) ?(kB|MB|GB|B|%|ms|s|)", shown)
        assert match, (path, shown)
        read = float(match[1].replace(",", "")) * UNITS[match[2]]
        assert read == pytest.approx(value, rel=6e-3, abs=1e-12), (path, shown)


def test_a_search_has_its_part_of_page_and_schema(joined: dict[str, Any]) -> None:
    uniform = {"int4-g32": fit.Point(2_240_000, 0.0022), "int8-row": fit.Point(3_820_000, 3.5e-5)}
    frontier = [fit.Point(970_000, 0.145), fit.Point(2_000_000, 0.00115)]
    limits, sizes = {"device_bytes": 2_000_000, "kl_mean": 0.01}, {"android": 1_999_616}
    given = (limits, 0.00115, 0.00115, sizes, {}, uniform, frontier, 0.0016)
    found = fit.Fit(Plan("fit", ()), *given).to_json()
    assert violations(found, SCHEMA["properties"]["fit"]) == []
    with_fit = joined | {"fit": found}
    html = page.render(with_fit)
    assert "The choice of grids" in html and "one grid for all layers" in html
    assert "The choice of grids" not in page.render(joined)
    shown = {path: exact for path, exact, _ in figures(html).found if path.startswith("fit.")}
    assert {"fit.limits.kl_mean", "fit.uniform.int8-row.kl", "fit.frontier.1.1"} <= shown.keys()
    for path, exact in shown.items():
        assert exact == at(with_fit, path), path


def test_notes_stand_in_the_page_and_the_summary(joined: dict[str, Any]) -> None:
    for text in (page.render(joined), summary.markdown(joined)):
        assert "NFC: the model" in text
    older = {key: value for key, value in joined.items() if key != "notes"}
    for text in (page.render(older), summary.markdown(older)):
        assert "NFC" not in text


def test_the_page_shows_every_part(joined: dict[str, Any]) -> None:
    paths = {path for path, _, _ in figures(page.render(joined)).found}
    layers = [i for i, row in enumerate(joined["layers"]) if row["relative_rmse"] is not None]
    texts = list(joined["accuracy"])
    wanted = {f"layers.{index}.relative_rmse" for index in layers}
    wanted |= {f"budgets.{i}.{key}" for i in range(6) for key in ("value", "limit")}
    wanted |= {f"footprint.memory.{part}" for part in joined["footprint"]["memory"]}
    wanted |= {f"groups.{i}.bytes" for i in range(len(joined["groups"]))}
    wanted |= {f"measurements.speed.{i}.{k}" for i in range(5) for k in ("ttft_s", "total_s")}
    wanted |= {f"accuracy.{text}.{key}" for text in texts for key in ("kl_p999", "top1", "ppl")}
    wanted |= {f"accuracy.{text}.histogram.counts.{i}" for text in texts for i in range(40)}
    wanted |= {"errors.quantization.kl_mean", "errors.runtime.kl_mean", "tokenizer.checked"}
    assert wanted <= paths
    assert "1 weight, mix Q4_K_M: Q8_0 instead of Q6_K" in page.render(joined)


def test_the_page_stands_alone(joined: dict[str, Any]) -> None:
    html = page.render(joined)
    assert figures(html).loads == []
    assert "url(" not in html and "@import" not in html
    assert html == page.render(joined)
    assert html.count('role="img" aria-label=') == html.count("<svg class") == 3


def test_text_of_a_model_is_never_markup(joined: dict[str, Any]) -> None:
    evil = copy.deepcopy(joined)
    evil["samples"] = [
        dict.fromkeys(("prompt", "reference", "artifact"), "<script>alert(1)</script>")
    ]
    evil["model"]["name"] = evil["inputs"]["model"]["name"] = '"><script>'
    evil["layers"][1]["name"] = "<script>"
    html = page.render(evil)
    assert "<script" not in html and "&lt;script&gt;alert" in html


def test_plots_of_nothing_are_nothing() -> None:
    assert plots.layer_errors([]) == plots.latency([]) == plots.divergence({}) == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.093, [0, 0.025, 0.05, 0.075, 0.1]),
        (0.077, 0.104, [0.07, 0.08, 0.09, 0.1, 0.11]),
        (0, 4, [0, 1, 2, 3, 4]),
        (0, 0, [0, 0.25]),
        (5, 5, [4, 6]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert plots.ticks(low, high) == expected


def test_one_layer_and_equal_values_can_be_drawn() -> None:
    row = {"name": "w", "kind": "attn_q", "layer": 0, "grid": "g", "method": "rtn"}
    for error in (0.0, 0.08):
        assert "<circle" in plots.layer_errors([{**row, "relative_rmse": error}])


# ---- the short forms ----


def test_junit_counts_what_failed() -> None:
    broken = copy.deepcopy(SAMPLE["report"])
    broken["budgets"][0].update(ok=False, message='too "large" <&>')
    suite = ET.fromstring(summary.junit(broken))[0]
    assert (suite.get("tests"), suite.get("failures")) == ("8", "1")
    assert len(suite) == 8
    (failure,) = suite.findall(".//failure")
    assert failure.get("message") == 'too "large" <&>'


def test_markdown() -> None:
    text = summary.markdown(SAMPLE["report"])
    assert text.startswith("## sample-0.5B for galaxy-s24: passed\n")
    assert "| budget kl_mean | ok |" in text
    assert (
        "- mix Q4_K_M: Q8_0 instead of Q6_K, whose blocks do not divide 896: 1 of the weights"
        in text
    )
    assert "- Not executed: Samsung Galaxy S24" in text
