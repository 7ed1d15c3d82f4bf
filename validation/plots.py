"""The report's plots as inline SVG, coloured by the page's CSS so that they follow light and dark.

Every mark of a value carries `data-path` (where it stands in the joined JSON) and `data-value`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 44
KINDS = {
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "attention output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def across(low: float, high: float) -> Scale:
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def upward(low: float, high: float) -> Scale:
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that span from `low` to `high`: the first at most low, the last at least high.

    >>> ticks(0, 0.093)
    [0.0, 0.025, 0.05, 0.075, 0.1]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def layer_errors(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """Relative RMSE of every quantized matrix inside a layer: one line per kind over the layers."""
    rows = [
        (index, row)
        for index, row in enumerate(layers)
        if row["layer"] is not None and row["relative_rmse"] is not None
    ]
    if not rows:
        return Markup("")
    count = 1 + max(row["layer"] for _, row in rows)
    values = [row["relative_rmse"] for _, row in rows]
    marks = ticks(0 if min(values) < max(values) / 2 else min(values), max(values))
    x, y = across(-0.5, count - 0.5), upward(marks[0], marks[-1])
    digits = max(0, 1 - math.floor(math.log10(marks[1] - marks[0])))
    parts = [_y_axis(marks, y, lambda value: f"{value:.{digits}f}")]
    parts += [_x_tick(x(layer), str(layer)) for layer in range(0, count, 1 + (count - 1) // 9)]
    parts.append(_x_title("layer"))
    for kind in KINDS:
        of_kind = [(index, row) for index, row in rows if row["kind"] == kind]
        points = [(x(row["layer"]), y(row["relative_rmse"])) for _, row in of_kind]
        parts.append(_line(points, kind))
        for (index, row), (px, py) in zip(of_kind, points, strict=True):
            words = f"{row['name']}: {row['relative_rmse']:.4g} ({row['grid']}, {row['method']})"
            path = f"layers.{index}.relative_rmse"
            parts.append(_dot(px, py, kind, path, row["relative_rmse"], words))
    worst = max((row for _, row in rows), key=lambda row: float(row["relative_rmse"]))
    label = f"Relative RMSE by layer and kind. Largest: {worst['name']}"
    return _svg(parts, f"{label}, {worst['relative_rmse']:.3g}")


def divergence(accuracy: Mapping[str, Any]) -> Markup:
    """Share of tokens by KL divergence on a logarithmic axis, one outline per text."""
    means = {name: table["kl_mean"] for name, table in accuracy.items()}
    tables = {name: table["histogram"] for name, table in accuracy.items() if "histogram" in table}
    filled = [
        index for table in tables.values() for index, tokens in enumerate(table["counts"]) if tokens
    ]
    if not filled:
        return Markup("")
    first, last = min(filled), max(filled) + 1
    edges = [math.log10(edge) for edge in next(iter(tables.values()))["edges"]]
    shares = {
        name: [tokens / sum(table["counts"]) for tokens in table["counts"]]
        for name, table in tables.items()
    }
    marks = ticks(0, 1.3 * max(max(values) for values in shares.values()))  # room for labels
    x, y = across(edges[first], edges[last]), upward(0, marks[-1])
    parts = [_y_axis(marks, y, lambda value: f"{value:.0%}")]
    decades = range(math.ceil(edges[first] - 1e-9), math.floor(edges[last] + 1e-9) + 1)
    parts += [_x_tick(x(decade), _power(decade)) for decade in decades]
    parts.append(_x_title("KL divergence per token, nats"))
    for name, values in shares.items():
        bins = range(first, last)
        parts.append(_steps([(x(edges[i]), x(edges[i + 1]), y(values[i])) for i in bins], name))
    for row, (name, mean) in enumerate(sorted(means.items(), key=lambda item: item[1])):
        at = x(min(max(math.log10(max(mean, 1e-12)), edges[first]), edges[last]))
        parts.append(_marker(at, row, name, mean))
    words = ", ".join(f"{name.replace('_', ' ')} mean {mean:.3g}" for name, mean in means.items())
    return _svg(parts, f"Distribution of the KL divergence over tokens: {words} nats")


def margins(pairs: Sequence[Sequence[float]]) -> Markup:
    """The margin of each pair in the artifact, over that in the reference."""
    marks = ticks(min(0, *(min(pair) for pair in pairs)), max(0, *(max(pair) for pair in pairs)))
    x, y = across(marks[0], marks[-1]), upward(marks[0], marks[-1])
    zero = x(0), y(0)
    left, right, bottom, top = x(marks[0]), x(marks[-1]), y(marks[0]), y(marks[-1])
    parts = [
        f'<path class="apart" d="M{left} {top}H{zero[0]}V{zero[1]}H{left}Z"/>',
        f'<path class="apart" d="M{zero[0]} {zero[1]}H{right}V{bottom}H{zero[0]}Z"/>',
        _y_axis(marks, y, lambda value: f"{value:g}"),
        *(_x_tick(x(mark), f"{mark:g}") for mark in marks),
        _x_title("margin in full precision"),
        f'<path class="same" d="M{left} {bottom}L{right} {top}"/>',
    ]
    for index, (reference, artifact) in enumerate(pairs):
        kind = "held_out" if reference * artifact > 0 else "out_of_distribution"
        path = f"preference.held_out.margins.{index}.1"
        words = f"pair {index + 1}: {reference:.4g} in full precision, {artifact:.4g} in the file"
        parts.append(_dot(x(reference), y(artifact), kind, path, artifact, words))
    same = sum(reference * artifact > 0 for reference, artifact in pairs)
    return _svg(parts, f"Margins of {len(pairs)} pairs, {same} of them of the same sign in both")


def latency(speed: Sequence[Mapping[str, Any]]) -> Markup:
    """Seconds to the first token and in all, over the length of the prompt.

    A reward model has its score when it has read the text: one line.
    """
    if not speed:
        return Markup("")
    lengths = [row["prompt_tokens"] for row in speed]
    marks = ticks(0, max(row["total_s"] for row in speed))
    gap = (max(lengths) - min(lengths)) * 0.06 or 1.0
    x, y = across(min(lengths) - gap, max(lengths) + gap), upward(0, marks[-1])
    parts = [_y_axis(marks, y, lambda value: f"{value:g} s")]
    parts += [_x_tick(x(length), str(length)) for length in lengths]
    parts.append(_x_title("prompt tokens"))
    lines = [("total_s", "in all"), ("ttft_s", "to the first token")]
    if speed[0]["generation_tps"] is None:
        lines = [("total_s", "to the score")]
    for key, words in lines:
        points = [(x(row["prompt_tokens"]), y(row[key])) for row in speed]
        parts.append(_line(points, key))
        for index, (row, (px, py)) in enumerate(zip(speed, points, strict=True)):
            path = f"measurements.speed.{index}.{key}"
            title = f"{row['prompt_tokens']} prompt tokens: {row[key]:.4g} s {words}"
            parts.append(_dot(px, py, key, path, row[key], title))
    ends = f"{speed[-1]['ttft_s']:.3g} s {lines[-1][1]} at {lengths[-1]} prompt tokens"
    return _svg(parts, f"Latency by prompt length on this machine: {ends}")


def frontier(fit: Mapping[str, Any]) -> Markup:
    """The least KL over the bytes on the device, beside one grid for all layers and the plan."""
    size = next(iter(fit["device_bytes"].values()))
    dots = [
        (
            nbytes,
            kl,
            "held_out",
            f"fit.frontier.{index}.1",
            "the least that any choice of grids has",
        )
        for index, (nbytes, kl) in enumerate(fit["frontier"])
    ]
    dots += [
        (row["device_bytes"], row["kl"], "out_of_distribution", f"fit.uniform.{grid}.kl", grid)
        for grid, row in fit["uniform"].items()
    ]
    dots.append((size, fit["kl_predicted"], "total_s", "fit.kl_predicted", "this bundle"))
    logs = [math.log10(max(kl, 1e-9)) for _, kl, _, _, _ in dots]
    sizes = [nbytes / 1e6 for nbytes, _, _, _, _ in dots]
    decades = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
    marks = ticks(min(sizes), max(sizes))
    x, y = across(marks[0], marks[-1]), upward(decades[0], max(decades[-1], decades[0] + 1))
    parts = [_y_axis([float(d) for d in decades], y, lambda value: _power(round(value)))]
    parts += [_x_tick(x(mark), f"{mark:g}") for mark in marks]
    parts.append(_x_title("MB on the device"))
    places = [(x(megabytes), y(log)) for megabytes, log in zip(sizes, logs, strict=True)]
    parts.append(_line(places[: len(fit["frontier"])], "held_out"))
    for (px, py), (nbytes, kl, name, path, words) in zip(places, dots, strict=True):
        parts.append(_dot(px, py, name, path, kl, f"{words}: {kl:.3g} nats in {nbytes:,} bytes"))
    label = f"Predicted KL by size; this bundle: {fit['kl_predicted']:.3g} nats in {size:,} bytes"
    return _svg(parts, label)


# ---- pieces ----


def _svg(parts: Iterable[str], label: str) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _y_axis(marks: Sequence[float], y: Scale, words: Callable[[float], str]) -> str:
    lines = []
    for index, mark in enumerate(marks):
        rule = "base" if index == 0 else "grid"
        lines.append(f'<path class="{rule}" d="M{LEFT} {y(mark)}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="y" x="{LEFT - 8}" y="{y(mark) + 4}">{words(mark)}</text>')
    return "".join(lines)


def _x_tick(x: float, words: str) -> str:
    return f'<text class="x" x="{x}" y="{HEIGHT - BOTTOM + 18}">{words}</text>'


def _x_title(words: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="x title" x="{middle}" y="{HEIGHT - 6}">{words}</text>'


def _line(points: Sequence[tuple[float, float]], name: str) -> str:
    d = "L".join(f"{x} {y}" for x, y in points)
    return f'<path class="line c-{name}" d="M{d}"/>' if len(points) > 1 else ""


def _steps(bins: Sequence[tuple[float, float, float]], name: str) -> str:
    bottom = HEIGHT - BOTTOM
    d = f"M{bins[0][0]} {bottom}" + "".join(f"V{top}H{right}" for _, right, top in bins)
    return f'<path class="steps c-{name}" d="{d}V{bottom}Z"/>'


def _dot(x: float, y: float, name: str, path: str, value: float, title: str) -> str:
    return (
        f'<circle class="dot c-{name}" cx="{x}" cy="{y}" r="3" data-path="{path}"'
        f' data-value="{json.dumps(value)}"><title>{escape(title)}</title></circle>'
    )


def _marker(x: float, row: int, name: str, value: float) -> str:
    """A dashed line at a mean; its label stands on the roomier side, in a row of its own."""
    side, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
    y = TOP + 12 + 18 * row
    return (
        f'<path class="mean c-{name}" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text class="note c-{name}" x="{x + shift}" y="{y}" text-anchor="{side}"'
        f' data-path="accuracy.{name}.kl_mean" data-value="{json.dumps(value)}">'
        f"mean {value:.3g}</text>"
    )


def _power(exponent: int) -> str:
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{digits}"
