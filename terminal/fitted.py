"""What a search for grids found, before work starts: where the bits go, and what others cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..architectures import Kind
from ..settings import format_size
from .console import table

if TYPE_CHECKING:
    from ..quantize.plan import Choice
    from ..shipping.fit import Fit, Point

_BAR = 32  # characters of the longest bar
_LAYERS = 48  # shown at most; more are drawn together
_KINDS = {
    Kind.Q: "q",
    Kind.K: "k",
    Kind.V: "v",
    Kind.QKV: "qkv",
    Kind.ATTENTION_OUTPUT: "o",
    Kind.GATE: "gate",
    Kind.UP: "up",
    Kind.GATE_UP: "gate_up",
    Kind.DOWN: "down",
}


def fit(found: Fit) -> None:
    """Limits, the plan as a map of grids over layers and kinds, and the frontier as bars."""
    rows = [[name, _value(name, limit)] for name, limit in found.limits.items()]
    rows += [[f"{name}: bytes on the device", format_size(n)] for name, n in found.sizes.items()]
    rows += [[f"{name}: memory", format_size(n)] for name, n in found.memory.items()]
    rows.append(["KL predicted", f"{found.predicted:.3g} nats"])
    if found.measured is not None:
        rows.append(["KL measured of the codes", f"{found.measured:.3g} nats"])
    table("The search", ["", ""], rows)
    _map(found.plan.choices)
    _bars(found)


def _value(name: str, limit: float) -> str:
    return f"at most {format_size(limit) if name.endswith('bytes') else f'{limit:g} nats'}"


def _map(choices: Sequence[Choice]) -> None:
    """The grid of every layer and kind; layers next to each other that are alike share a line."""
    kinds = [kind for kind in _KINDS if any(c.weight.kind is kind for c in choices)]
    layers: dict[int, dict[Kind, str]] = {}
    for choice in choices:
        weight = choice.weight
        if weight.is_matrix and weight.layer is not None:
            name = choice.grid.name if choice.grid else "float16"
            layers.setdefault(weight.layer, {})[weight.kind] = name
        elif weight.is_matrix:
            print(f"{weight.name}: {choice.grid.name if choice.grid else 'float16'}")
    rows: list[tuple[int, int, dict[Kind, str]]] = []
    for layer, grids in layers.items():
        if rows and rows[-1][2] == grids:
            rows[-1] = rows[-1][0], layer, grids
        else:
            rows.append((layer, layer, grids))
    shown = [
        [f"{first}" if first == last else f"{first}-{last}", *(grids[kind] for kind in kinds)]
        for first, last, grids in rows[:_LAYERS]
    ]
    table("", ["layer", *(_KINDS[kind] for kind in kinds)], shown)
    if len(rows) > _LAYERS:
        print(f"... and {len(rows) - _LAYERS} more lines; `--json` and the manifest hold them all")


def _bars(found: Fit) -> None:
    """The least loss by size, the plan's own and those of one grid for all layers among them."""
    size = next(iter(found.sizes.values()))
    points: list[tuple[str, int, float]] = [("", p.nbytes, p.loss) for p in found.frontier]
    points += [(f"all {grid}", p.nbytes, p.loss) for grid, p in _telling(found.uniform).items()]
    points.append(("this plan", size, found.predicted))
    logs = [math.log10(max(loss, 1e-9)) for _, _, loss in points]
    low, high = min(logs), max(logs)
    rows = []
    for (name, nbytes, loss), log in sorted(zip(points, logs, strict=True), key=lambda p: p[0][1]):
        length = 1 + round((_BAR - 1) * (log - low) / (high - low or 1))
        bar = ("█" if name == "this plan" else "░" if name else "▒") * length
        rows.append([format_size(nbytes), f"{loss:.3g}", bar, name])
    table(
        "Least KL by size (the bars are logarithmic)",
        ["on the device", "KL predicted", "", ""],
        rows,
        words=True,
    )


def _telling(uniform: Mapping[str, Point]) -> dict[str, Point]:
    """Without those that another grid beats in both size and loss."""
    return {
        grid: point
        for grid, point in uniform.items()
        if not any(o.nbytes <= point.nbytes and o.loss < point.loss for o in uniform.values())
    }


def plan(found: Mapping[str, Any]) -> None:
    """A line for each preset and target of `slimport plan`."""
    print(f"{found['family']}, {found['parameters'] / 1e9:.2f}B parameters")
    for target in dict.fromkeys(row["target"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["target"] == target]
        table(
            f"{target}: {rows[0]['container']}, context {rows[0]['context']:,}",
            ["preset", "bits", "on the device", "memory", "anonymous", "longest context", ""],
            [_plan_row(row) for row in rows],
        )
    if not found["tokenizer"]:
        print("Sizes are estimates: no tokenizer lies beside the config.")
    print("Memory is predicted: mapped pages can be evicted, anonymous ones only swapped.")


def _plan_row(row: Mapping[str, Any]) -> list[str]:
    def size(key: str) -> str:
        return "not known" if row[key] is None else format_size(row[key])

    if not row["device_bytes"]:
        return [row["preset"], f"{row['bits']:.2f}", "", "", "", "", f"no: {row['refused']}"]
    longest = "not known" if row["longest"] is None else f"{row['longest']:,}"
    verdict = f"no: {row['refused']}" if row["refused"] else "fits"
    given = [row["preset"], f"{row['bits']:.2f}", size("device_bytes"), size("memory")]
    return [*given, size("anonymous"), longest, verdict]
