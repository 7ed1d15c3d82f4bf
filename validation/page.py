"""report.html: one self-contained page over the joined report and measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ..settings import METRICS, format_size
from . import plots, summary

UNKNOWN = "not known"
TITLES = {
    "device_bytes": "On the device",
    "download_bytes": "Download, compressed",
    "model_bytes": "Model file",
    "memory_bytes": "Memory",
    "anonymous_bytes": "Anonymous memory",
    "kl_mean": "Mean KL divergence",
    "ppl_ratio": "Perplexity, artifact over reference",
    "top1": "Top-1 agreement",
    "score_error": "Score difference over the spread of scores",
    "pair_agreement": "Pair agreement",
    "npu_nodes": "Operators on the NPU",
    "npu_weight_bytes": "Weights on the NPU",
    "gpu_nodes": "Operators on the GPU",
    "gpu_weight_bytes": "Weights on the GPU",
}
MEMORY = {
    "mapped": "weights, mapped from the file",
    "repacked": "weights, repacked for the processor",
    "kv_cache": "KV cache",
    "compute": "compute buffers",
    "adapter": "separate adapter",
}
CONTAINERS = {
    "gguf": "GGUF",
    "onnx": "ONNX",
    "onnx-fp16": "ONNX float16",
    "ort": "ORT",
    "qnn": "QNN",
    "coreml": "Core ML",
    "coreai": "Core AI",
    "executorch": "ExecuTorch",
    "executorch-vulkan": "ExecuTorch Vulkan",
}


def render(joined: Mapping[str, Any]) -> str:
    """The page. Every figure is a <data> element whose value is the JSON's own, by its path."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    predicted = joined["footprint"].get("predicted", {}).get("keys", ())
    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        **{key: value for key, value in joined.items() if key != "fit"},
        figure=partial(figure, joined),
        checks=summary.checks(joined),
        plots=plots,
        fit=joined.get("fit"),
        kinds=plots.KINDS,
        titles=TITLES,
        memory_parts=MEMORY,
        everything_predicted="memory.compute" in predicted,
        container_name=CONTAINERS.get(joined["container"], joined["container"]),
        units={metric: UNITS[kind.unit] for metric, kind in METRICS.items()},
        positions={row["name"]: index for index, row in enumerate(joined["layers"])},
        fill=fill,
        words=words,
    )


def figure(joined: Mapping[str, Any], path: str, unit: str) -> Markup:
    """The value at a dotted `path` such as `layers.3.bytes`, rounded for people by its unit."""
    value: Any = joined
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    shown = UNKNOWN if value is None else FORMATS[unit](value)
    exact = escape(json.dumps(value))
    return Markup(f'<data value="{exact}" data-path="{path}">{escape(shown)}</data>')


def fill(budget: Mapping[str, Any]) -> float:
    """How far a budget's bar is filled, in percent; 0 where the value is not known."""
    value, limit = budget["value"], budget["limit"]
    if value is None:
        return 0.0
    whole = 1.0 if METRICS[budget["metric"]].at_least else limit
    share = float(value / whole) if whole else 1.0
    return round(100 * min(1.0, share), 2)


def words(value: Any) -> str:
    """An input of the manifest in one line: names and digests, without braces."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(words, value)) or "none"
    return "none" if value is None else str(value)


def number(value: float) -> str:
    """Three significant digits: 0.0100, 12.4, 116, 1,234, 2.31e-5."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".").replace("e-0", "e-")


def seconds(value: float) -> str:
    return f"{number(value * 1000)} ms" if value < 1 else f"{number(value)} s"


FORMATS: dict[str, Callable[[Any], str]] = {
    "bytes": format_size,
    "count": lambda value: f"{value:,}",
    "number": number,
    "ratio": lambda value: f"{value:.4f}",
    "bits": lambda value: f"{value:.2f}",
    "share": lambda value: f"{value:.2%}",
    "rate": number,
    "seconds": seconds,
}
UNITS = {"bytes": "bytes", "nats": "number", "fraction": "share", "ratio": "ratio"}
