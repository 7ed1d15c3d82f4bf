"""Results as tables for a person at a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline import report_of
from ..settings import format_size
from .console import table

if TYPE_CHECKING:
    from ..shipping.forecast import Forecast
    from ..targets.target import Target

Rows = Sequence[Mapping[str, Any]]


def bundle(folder: Path) -> None:
    """One table for a finished bundle: files, bytes, accuracy, speed, budgets, what was not run."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = [[entry["path"], format_size(entry["bytes"])] for entry in manifest["files"]]
    table(f"{folder}", ["file", "bytes"], files)
    if not (manifest["validated"] or manifest.get("judged")):
        fallbacks(manifest["fallbacks"])
        notes(manifest.get("notes", []))
        print("Not validated (--no-validate): `slimport check` will refuse it.")
        return
    report(report_of(folder))
    print(f"Report: {folder / 'report/report.html'}")


def report(found: Mapping[str, Any]) -> None:
    """Accuracy, footprint, speed and budgets of a joined report."""
    if "preference" in found:
        columns = ["scores", "same order", "difference", "of the spread", "chosen ahead", "pairs"]
        table("", columns, _preference(found))
    else:
        columns = ["accuracy", "KL mean", "KL 99%", "top-1", "perplexity", "tokens"]
        table("", columns, _accuracy(found))
    footprint = found["footprint"]
    memory = footprint["memory"]
    table(
        "",
        ["footprint", ""],
        [
            ["model", format_size(footprint["model_bytes"])],
            ["bits per weight", f"{footprint['bits_per_weight']:.2f}"],
            ["download", format_size(footprint["download_bytes"])],
            *([f"memory, {name.replace('_', ' ')}", format_size(memory[name])] for name in memory),
        ],
    )
    if speed := found["measurements"]["speed"]:
        columns = ["on this machine: prompt", "TTFT", "prompt tokens/s", "generated tokens/s"]
        if "preference" in found:
            columns = ["on this machine: text", "score after", "tokens/s"]
        table("", columns, [_speed(row) for row in speed])
    budgets(found["budgets"])
    fallbacks(found["fallbacks"])
    notes(found.get("notes", []))
    for words in found["executed"]:
        print(f"Executed: {words}")
    for words in found["not_executed"]:
        print(f"Not executed: {words}")


def _accuracy(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            text.replace("_", " "),
            f"{row['kl_mean']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['ppl_reference']:.3f} > {row['ppl']:.3f}",
            f"{row['tokens']:,}",
        ]
        for text, row in found["accuracy"].items()
    ]


def _preference(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            text.replace("_", " "),
            f"{row['pair_agreement']:.1%}",
            f"{row['score_rmse']:.4f}",
            f"{row['score_error']:.2%}",
            f"{row['accuracy_reference']:.1%} > {row['accuracy']:.1%}",
            f"{row['pairs']:,}",
        ]
        for text, row in found["preference"].items()
    ]


def _speed(row: Mapping[str, Any]) -> list[str]:
    generated = row["generation_tps"]
    return [
        f"{row['prompt_tokens']}",
        f"{row['ttft_s'] * 1000:.0f} ms",
        f"{row['prompt_tps']:.0f}",
        *([] if generated is None else [f"{generated:.0f}"]),
    ]


def budgets(rows: Rows) -> None:
    table(
        "",
        ["budget", "", "value", "limit"],
        [
            [
                row["metric"],
                "ok" if row["ok"] else "BROKEN",
                _value(row["value"], row["unit"]),
                _value(row["limit"], row["unit"]),
            ]
            for row in rows
        ],
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return format_size(value) if unit == "bytes" else f"{value:.4g}"


def forecast(found: Forecast) -> None:
    """The plan, predicted bytes, memory, disk and time of a dry run."""
    grids(found.grids)
    for job in found.jobs:
        rows = [
            [name, f"{'about ' if name in job.estimated else ''}{format_size(size)}"]
            for name, size in job.files.items()
        ]
        table(f"{job.target}: {job.container}", ["file", "bytes"], rows)
    table(
        "",
        ["predicted", ""],
        [
            ["anonymous memory, without judging", format_size(found.memory)],
            ["disk, with temporary files", format_size(found.disk)],
            ["free disk", format_size(found.free_disk)],
            ["time on this machine, about", f"{found.seconds:.0f} s"],
        ],
    )
    if found.disk > found.free_disk:
        print("Not enough free disk: free some, or give another --output.")
    fallbacks(found.fallbacks)
    for name, reason in found.floats.items():
        if reason not in found.fallbacks:
            print(f"{name}: {reason}")


def fallbacks(found: Mapping[str, Sequence[str]]) -> None:
    """What a mix could not give its own type, and what it has instead."""
    for reason, names in found.items():
        more = "s" if names[1:] else ""
        print(f"{len(names)} weight{more}, {reason} ({names[0]}{', ...' if more else ''})")


def notes(found: Sequence[str]) -> None:
    """What an app must do that the runtime does not."""
    for note in found:
        print(f"To do in the app: {note}")


def grids(rows: Rows) -> None:
    table(
        "",
        ["grid", "method", "weights", "bytes"],
        [
            [row["grid"], row["method"], str(row["weights"]), format_size(row["bytes"])]
            for row in rows
        ],
    )


def comparison(found: Mapping[str, Any]) -> None:
    """Two files: sizes, types, the tensors that differ, and how far their logits lie apart."""
    first, second = found["files"]
    print(f"first:  {first['path']}\nsecond: {second['path']}")
    rows = [["file", *map(format_size, (first["bytes"], second["bytes"]))]]
    rows += [["bits per weight", *(f"{side['bits_per_weight']:.3f}" for side in (first, second))]]
    for kind, sides in found["types"].items():
        rows.append([kind, *(_tensors(side) for side in sides)])
    table("", ["", "first", "second"], rows)
    differing = [tensor for tensor in found["tensors"] if not tensor["equal"]]
    print(f"{len(found['tensors']) - len(differing)} tensors are equal, {len(differing)} differ")
    if differing:
        table(
            "", ["by kind", "first", "second", "tensors", "bytes", "worst rmse"], _kinds(differing)
        )
    for which, accuracy in zip(("first", "second"), found["reports"], strict=True):
        if accuracy:
            columns = [f"{which} to full precision", "KL mean", "KL 99%", "top-1", "perplexity"]
            table("", [*columns, "tokens"], _accuracy({"accuracy": accuracy}))
    for side in found["files"]:
        if side["beside"]:
            print(f"Not compared: {', '.join(side['beside'])} of {side['path']}")
    if between := found["divergence"]:
        columns = ["second to first", "KL mean", "KL 99%", "top-1", "perplexity", "tokens"]
        table(f"On {between['text']}", columns, _accuracy({"accuracy": {"logits": between}}))
    else:
        print("Logits were not compared: give --eval TEXT.")


def _tensors(side: Mapping[str, int]) -> str:
    if not side["tensors"]:
        return "-"
    return f"{side['tensors']} tensors, {format_size(side['bytes'])}"


def _kinds(tensors: Rows) -> list[list[str]]:
    """Differing tensors of one kind and the same types, over all layers, in one line."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        parts = tensor["name"].split(".")
        kind = parts[2] if parts[0] == "blk" and len(parts) > 2 else parts[0]
        a, b = (name or "-" for name in tensor["types"])
        groups.setdefault((kind, a, b), []).append(tensor)
    rows = []
    for names, group in groups.items():
        grown = sum(tensor["bytes"][1] - tensor["bytes"][0] for tensor in group)
        errors = [t["relative_rmse"] for t in group if t["relative_rmse"] is not None]
        worst = f"{max(errors):.4f}" if errors else "not comparable"
        rows.append([*names, str(len(group)), f"{grown:+,}", worst])
    return rows


def inspection(found: Mapping[str, Any]) -> None:
    """A model, a bundle or a GGUF file, one line per fact."""
    rows = [
        [key, _short(value)]
        for key, value in found.items()
        if key not in ("schema", "plan", "files", "decoder", "metadata", "recipe")
    ]
    for part in ("decoder", "metadata"):
        rows += [[f"{part}.{key}", _short(value)] for key, value in found.get(part, {}).items()]
    table("", ["", ""], rows, words=True)
    if "plan" in found:
        grids(found["plan"]["summary"])


def _short(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return words if len(words) < 100 else f"{words[:97]}..."


def targets(profiles: Sequence[Target]) -> None:
    table(
        "",
        ["target", "what", "container", "context", "memory budget"],
        [
            [
                profile.name,
                profile.title,
                ", ".join(profile.containers),
                str(profile.context_length),
                format_size(profile.budgets["memory_bytes"].limit),
            ]
            for profile in profiles
        ],
    )


def doctor(rows: Rows) -> None:
    shown = [[r["name"], "ok" if r["ok"] else "MISSING", r["found"], r["cure"]] for r in rows]
    table("", ["", "", "found", "cure"], shown, words=True)
