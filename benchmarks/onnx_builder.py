"""ONNX files beside those of onnxruntime-genai's own model builder: cost, speed and quality.

Cost: both commands in processes of their own, on a random model of SmolLM-135M's shape. Speed: both
files in onnxruntime-genai, run in turns. Quality: KL divergence in ONNX Runtime against
transformers in float32 on held-out text of trained models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from meter import Run, cache_folder, watch
from quality import _EXAMPLE, Case, open_case
from random_llama import SMOLLM, random_llama

from slimport.export import onnx
from slimport.export.container import Deployment
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.validation import divergence
from slimport.validation.divergence import Divergence
from slimport.validation.runtimes import onnxruntime

_LAYERS, _CONTEXT = 30, 1024
_PROMPT, _GENERATED, _TURNS = 256, 64, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=3, action="append", metavar=("MODEL", "TEXT", "HELD_OUT"))
    parser.add_argument("--parts", nargs="*", default=["cost", "speed", "quality"])
    parser.add_argument("--runs", type=int, default=3, help="of each command")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        folder, prompt, count = options.decode
        print(json.dumps(decode(folder, int(prompt), int(count))))
        return
    with tempfile.TemporaryDirectory(dir=_made(cache_folder())) as work:
        if {"cost", "speed"} & {*options.parts}:
            model = random_llama(_LAYERS, cache_folder(), SMOLLM)
            folders = print_cost(model, Path(work), options.runs)
            if "speed" in options.parts:
                print_speed(folders)
        if "quality" in options.parts:
            for model, text, held_out in options.case or [_EXAMPLE]:
                paths = (Path(model), Path(text), Path(held_out))
                if not all(path.exists() for path in paths):
                    print(f"{model}: skipped, a path is not there\n")
                    continue
                with tempfile.TemporaryDirectory(dir=work) as place:
                    case = open_case(*paths, Path(place), 128, options.windows, 512)
                    print_quality(case)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def print_cost(model: Path, work: Path, runs: int) -> dict[str, Path]:
    """A line per command; returns what each wrote."""
    print(f"{'135M shape':24}{'s':>8}{'CPU-s':>8}{'peak MB':>9}{'file MB':>9}")
    found: dict[str, list[Run]] = {}
    folders: dict[str, Path] = {}
    for _ in range(runs):
        for name, command, folder in _commands(model, work):
            shutil.rmtree(folder, ignore_errors=True)
            found.setdefault(name, []).append(watch(command))
            folders[name] = folder / "android" if name.startswith("slimport") else folder
    for name, costs in found.items():
        size = sum(path.stat().st_size for path in folders[name].glob("model.onnx*"))
        print(
            f"{name:24}{median(c.wall for c in costs):8.1f}{median(c.cpu for c in costs):8.1f}"
            f"{max(c.peak for c in costs) / 1e6:9.0f}{size / 1e6:9.1f}",
            flush=True,
        )
    print()
    return folders


def _commands(model: Path, work: Path) -> Iterator[tuple[str, list[str], Path]]:
    for preset in ("int4-all", "int4"):
        folder = work / preset
        command = f"export {model} --container onnx --target android --no-validate -q"
        quantize = f"--preset {preset} --method rtn --output {folder}"
        words = [sys.executable, "-m", "slimport", *command.split(), *quantize.split()]
        yield f"slimport {preset}", words, folder
    yield "genai builder int4", _builder(model, work / "builder"), work / "builder"


def _builder(model: Path, folder: Path, *options: str) -> list[str]:
    words = f"-i {model} -o {folder} -p int4 -e cpu -c {folder}.cache".split()
    extra = ["--extra_options", *options] if options else []
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", *words, *extra]


def print_speed(folders: dict[str, Path]) -> None:
    """Tokens per second in genai, the files in turns; a process each."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(_TURNS):
        for name, folder in folders.items():
            command = [sys.executable, __file__, "--decode", str(folder)]
            done = subprocess.run(
                [*command, str(_PROMPT), str(_GENERATED)], check=True, capture_output=True
            )
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'in genai':24}{'prompt/s':>10}{'tokens/s':>10}{'CPU-ms/token':>14}{'RssAnon MB':>12}")
    for name, turns in found.items():
        figures = [median(turn[key] for turn in turns) for key in turns[0]]
        print(f"{name:24}" + "{:10.0f}{:10.1f}{:14.1f}{:12.0f}".format(*figures), flush=True)
    print()


def decode(folder: str, prompt: int, count: int) -> dict[str, float]:
    """Prompt and generated tokens per second, CPU of a token, memory gained; three prompts."""
    import numpy as np
    import onnxruntime_genai as genai
    from meter import anonymous

    before = anonymous()
    model = genai.Model(folder)
    ids = np.random.default_rng(0).integers(3, 2000, prompt).astype(np.int32)
    speeds = []
    for _ in range(3):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=_CONTEXT, min_length=_CONTEXT, do_sample=False)
        generator = genai.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(ids)
        first, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            generator.generate_next_token()
        end, total = time.perf_counter(), time.process_time()
        speeds.append((prompt / (first - start), count / (end - first), (total - used) / count))
    prompt_speed, speed, cpu = (median(column) for column in zip(*speeds, strict=True))
    memory = (anonymous() - before) / 1e6
    return {"prompt": prompt_speed, "speed": speed, "cpu_ms": 1e3 * cpu, "memory": memory}


def print_quality(case: Case) -> None:
    print(
        f"{case.checkpoint.name}: {case.held_out.ids.size:,} held-out tokens\n"
        f"{'file':28}{'bytes':>12}{'KL mean':>11}{'+-':>10}{'top-1':>8}"
    )
    for name, folder in _candidates(case):
        size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        found = _judged(case, folder)
        print(
            f"{name:28}{size:12,}{found.kl_mean:11.6f}{found.kl_mean_error or 0:10.6f}"
            f"{found.top1:8.4f}",
            flush=True,
        )
    print()


def _candidates(case: Case) -> Iterator[tuple[str, Path]]:
    """Name, and folder of the files."""
    options: dict[str, Sequence[str]] = {
        "builder default": (),
        "builder rtn": ("algo_config=rtn",),
        "builder k_quant": ("algo_config=k_quant",),
    }
    for name, extra in options.items():
        folder = case.work / name.replace(" ", "-")
        watch(_builder(case.checkpoint.folder, folder, *extra))
        yield name, folder
    for preset in ("int4-all", "int4"):
        for method in ("rtn", "gptq"):
            plan = make_plan(case.decoder, preset, method)
            made = quantize(
                case.checkpoint,
                case.checkpoint.config,
                plan,
                case.work / "quantized",
                calibration=case.calibration if plan.uses("gptq") else None,
                tokenizer_folder=case.checkpoint.folder,
                progress=lambda stage, done, total: None,
            )
            folder = _made(case.work / f"{preset}-{method}")
            onnx.write(made, case.tokenizer, folder, Deployment(512))
            yield f"slimport {preset} {method}", folder


def _judged(case: Case, folder: Path) -> Divergence:
    artifact = case.work / "artifact.npy"
    onnxruntime.logits(folder / "model.onnx", case.held_out.ids, artifact)
    return divergence.compare(case.oracle, artifact, case.held_out.ids)


if __name__ == "__main__":
    main()
