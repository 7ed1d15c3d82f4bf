"""The search for grids beside one grid for all layers and llama.cpp's mixes, at the same bytes.

Every row is a real GGUF file, run in llama.cpp against transformers in float32 on held-out text. A
group begins with what sets the size: all layers on one type with tables in int8-row, or a mix of
llama.cpp, by ggml's kernels with an importance matrix and by GPTQ. Its last row is what the search
makes of no more bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quality import LINEARS, STORYTELLER, Case, judged, open_case

from slimport.export import gguf
from slimport.export.container import Deployment
from slimport.quantize.plan import Plan, make_plan
from slimport.quantize.quantizer import quantize
from slimport.recipe import Recipe
from slimport.shipping import fit
from slimport.shipping.shipment import make_jobs
from slimport.shipping.source import open_source

_UNIFORM = ("Q3_K",)
_MIXES = ("Q3_K_M", "Q2_K")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", nargs=3, action="append", metavar=("MODEL", "CALIBRATION", "HELD_OUT")
    )
    parser.add_argument("--windows", type=int, default=48, help="held-out windows")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens in a window, at most")
    options = parser.parse_args()
    for model, calibration, held_out in options.case or [STORYTELLER]:
        with tempfile.TemporaryDirectory() as work:
            counts = options.calibration_windows, options.windows, options.length
            case = open_case(Path(model), Path(calibration), Path(held_out), Path(work), *counts)
            print_table(case, Path(model))


def print_table(case: Case, model: Path) -> None:
    print(
        f"{case.checkpoint.name}: {case.held_out.ids.size:,} held-out tokens\n"
        f"{'size of':12}{'made by':22}{'file':>11}{'KL mean':>11}{'+-':>10}{'99.9%':>9}"
        f"{'top-1':>8}{'s':>7}{'ratio':>7}"
    )
    keep = case.work / "sensitivities.json"
    for kind in (*_UNIFORM, *_MIXES):
        first: float | None = None
        limit = 0
        for name, plan in _givers(case, kind):
            started = time.perf_counter()
            size = _write(case, plan)
            limit = max(limit, size)
            first = _row(case, kind, name, size, time.perf_counter() - started, first)
        started = time.perf_counter()
        plan = _searched(case, model, limit, keep)
        size = _write(case, plan)
        _row(case, kind, "the search, gptq", size, time.perf_counter() - started, first)


def _givers(case: Case, kind: str) -> Iterator[tuple[str, Plan]]:
    for name, method in (("ggml + imatrix", "imatrix"), ("gptq", "gptq")):
        if kind in _MIXES:
            yield f"mix, {name}", make_plan(case.decoder, kind, method)
        else:
            yield name, make_plan(case.decoder, "int4", method, {LINEARS: kind})


def _searched(case: Case, model: Path, limit: int, keep: Path) -> Plan:
    given = {"model": str(model), "targets": ["android"], "name": case.checkpoint.name}
    recipe = Recipe().override(**given, device_bytes=limit, sensitivities=keep)
    source = open_source(recipe)
    search = fit.Search(recipe, source, make_jobs(recipe, source))
    return search.find(fit.losses_of(search, case.calibration, lambda *stage: None)).plan


def _write(case: Case, plan: Plan) -> int:
    """Quantize by `plan` and write the file; its bytes."""
    quantized = quantize(
        case.checkpoint,
        case.checkpoint.config,
        plan,
        case.work / "quantized",
        calibration=case.calibration if plan.uses("gptq") else case.importance,
        tokenizer_folder=case.checkpoint.folder,
        progress=lambda stage, done, total: None,
    )
    (file,) = gguf.write(quantized, case.tokenizer, case.work, Deployment(1024))
    return file.stat().st_size


def _row(case: Case, kind: str, name: str, size: int, seconds: float, first: float | None) -> float:
    """Judge the file that was written last and print its line; the group's first KL."""
    found = judged(case)
    first = found.kl_mean if first is None else first
    print(
        f"{kind:12}{name:22}{size:11,}{found.kl_mean:11.6f}{found.kl_mean_error or 0:10.6f}"
        f"{found.kl_p999:9.4f}{found.top1:8.4f}{seconds:7.1f}{found.kl_mean / first:7.2f}",
        flush=True,
    )
    return first


if __name__ == "__main__":
    main()
