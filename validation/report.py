"""report.json and measurements.json: the contract that pipelines read (docs/report.schema.json).

report.json holds what is the same on every run; measurements.json what belongs to this machine and
this moment. The page (page.py) and the short forms (summary.py) show these values and no others.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import bundle
from ..quantize.versions import processor
from ..targets.limits import Finding
from ..targets.target import Limit, Target
from . import budget, page, summary

if TYPE_CHECKING:  # both bring torch, which a page does not need
    from ..quantize.plan import Choice, Plan
    from .judge import Judgement
    from .reward import RewardJudgement
    from .runtime import Measurements

SCHEMA = "slimport.report/1"
MEASUREMENTS_SCHEMA = "slimport.measurements/1"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is reported on.

    Attributes:
        model: "name" and "version".
        container, runtime: as they name themselves, the runtime with its version.
        weights_digest: of the codes, `sha256:...`.
        layers: one row per weight, see `layer_rows`.
        footprint: "device_bytes", "download_bytes", "model_bytes" and "memory", a table of bytes:
            "mapped", "repacked", "kv_cache", "compute".
        limits: metric -> limit, see `budget.limits`.
        adapters: "name", "mode" and "recovery" of each.
        texts: what the model was judged on: name of the text -> where it comes from.
        samples: "prompt", "reference" and "artifact": greedy text of both.
        inputs, tools: as in the manifest.
        findings: of targets.limits.
        not_judged: in words, what ships and was not run here.
        fallbacks: as Plan.fallbacks.
        notes: as Container.notes.
        accelerator: shares of nodes and weights on the NPU or GPU; None for a CPU's container.
        executes: whether the runtime is a device's; False: a model of the file's program.
    """

    model: Mapping[str, Any]
    target: Target
    container: str
    runtime: str
    weights_digest: str
    layers: Sequence[Mapping[str, Any]]
    footprint: Mapping[str, Any]
    limits: Mapping[str, Limit]
    adapters: Sequence[Mapping[str, Any]] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    not_judged: Sequence[str] = ()
    fallbacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    accelerator: Mapping[str, float] | None = None
    executes: bool = True


def build(
    subject: Subject, judgement: Judgement | RewardJudgement, codes_equal: bool
) -> dict[str, Any]:
    """report.json; `codes_equal`: whether the file was read back to the very codes."""
    weights = sum(row["weights"] for row in subject.layers)
    memory = subject.footprint["memory"]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": dict(subject.model),
        "target": subject.target.name,
        "container": subject.container,
        "runtime": subject.runtime,
        "weights_digest": subject.weights_digest,
        "footprint": {
            **subject.footprint,
            "bits_per_weight": 8 * sum(row["bytes"] for row in subject.layers) / weights,
            "memory_bytes": sum(memory.values()),
            "anonymous_bytes": sum(memory.values()) - memory["mapped"],
            "context_length": subject.target.context_length,
            "kv_cache": subject.target.kv_cache,
            "isa": list(subject.target.isa),
        },
        **({"accelerator": dict(subject.accelerator)} if subject.accelerator else {}),
        **judgement.to_json(codes_equal),
        "adapters": [dict(adapter) for adapter in subject.adapters],
        "layers": [dict(row) for row in subject.layers],
        "fallbacks": {reason: list(names) for reason, names in subject.fallbacks.items()},
        "groups": size_by_group(subject.layers),
        "texts": dict(subject.texts),
        "samples": [dict(sample) for sample in subject.samples],
        "findings": [asdict(finding) for finding in subject.findings],
        "notes": list(subject.notes),
        "inputs": dict(subject.inputs),
        "tools": dict(subject.tools),
        "executed": [f"the shipped file in {subject.runtime} on {platform.machine()}"]
        if subject.executes
        else [],
        "not_executed": [not_executed(subject.target), *subject.not_judged],
    }
    budgets = budget.check(report, subject.limits)
    report["budgets"] = [one.to_json() for one in budgets]
    report["passed"] = passed(report)
    return report


def passed(report: Mapping[str, Any]) -> bool:
    """Whether every check holds."""
    return all(ok for _, ok, _ in summary.checks(report))


def not_executed(target: Target) -> str:
    """In words, what no report from this machine can vouch for."""
    return f"{target.title}: no phone hardware was used; its memory is predicted, not run"


def layer_rows(
    plan: Plan, errors: Mapping[str, float], tensor_bytes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One row per weight, in the order of the forward pass.

    Args:
        errors: relative RMSE of each quantized weight; a float one has none (null).
        tensor_bytes: bytes of each weight in the container; a weight that is not there counts as
            packed codes and fp16 scales, or as float16, float32 if it is a vector.
    """
    return [
        {
            "name": choice.weight.name,
            "kind": choice.weight.kind.value,
            "layer": choice.weight.layer,
            "grid": choice.grid.name if choice.grid else None,
            "method": choice.method,
            "weights": prod(choice.weight.shape),
            "bytes": tensor_bytes.get(choice.weight.name, _bytes(choice)),
            "relative_rmse": errors.get(choice.weight.name) if choice.grid else None,
        }
        for choice in plan.choices
    ]


def _bytes(choice: Choice) -> int:
    shape = choice.weight.shape
    if choice.grid and len(shape) == 2:
        return choice.grid.bytes_of((shape[0], shape[1]))
    return prod(shape) * (2 if len(shape) == 2 else 4)


GROUPS = {
    "token_embd": "embedding",
    "output": "head",
    "cls.output": "head",
    "attn_q": "attention",
    "attn_k": "attention",
    "attn_v": "attention",
    "attn_output": "attention",
    "ffn_gate": "feed-forward",
    "ffn_up": "feed-forward",
    "ffn_down": "feed-forward",
}


def size_by_group(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes and bits per weight of embedding, head, attention, feed-forward and norms."""
    groups: dict[str, dict[str, Any]] = {}
    for row in layers:
        name = GROUPS.get(row["kind"], "norms")
        group = groups.setdefault(name, {"group": name, "grids": [], "weights": 0, "bytes": 0})
        group["weights"] += row["weights"]
        group["bytes"] += row["bytes"]
        group["grids"] = sorted({*group["grids"], row["grid"] or "float"})
    for group in groups.values():
        group["bits_per_weight"] = 8 * group["bytes"] / group["weights"]
    return sorted(groups.values(), key=lambda group: (-group["bytes"], group["group"]))


def measurements(measured: Measurements) -> dict[str, Any]:
    """measurements.json: what belongs to this machine and this moment; no host name."""
    return {
        "schema": MEASUREMENTS_SCHEMA,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "speed": [speed.to_json() for speed in measured.speed],
        "memory": measured.memory.to_json(),
        "rss_anon": measured.rss_anon,
        "rss_file": measured.rss_file,
    }


def machine() -> str:
    """Processor, cores and system, such as "AMD EPYC 7B13, 2 cores, Linux x86_64"."""
    cores = os.cpu_count() or 1
    return f"{processor()}, {cores} cores, {platform.system()} {platform.machine()}"


def joined(report: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one object, as `--json` prints them and the page shows them."""
    return {**report, "measurements": dict(measured)}


def write(folder: Path, report: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Write the five files of a bundle's report/ into `folder`, which may exist."""
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_bytes(bundle.canonical_json(report))
    (folder / "measurements.json").write_bytes(bundle.canonical_json(measured))
    (folder / "summary.md").write_text(summary.markdown(report), encoding="utf-8")
    (folder / "junit.xml").write_text(summary.junit(report), encoding="utf-8")
    html = page.render(joined(report, measured))
    (folder / "report.html").write_text(html, encoding="utf-8")
