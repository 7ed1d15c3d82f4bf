"""Core ML packages beside coremltools: cost and size; and the interpreter beside torch.

A random model of SmolLM-135M's shape, int4 in groups of 32 and an int8 table. coremltools converts
transformers' decoder, without a cache and for one length, and then quantizes it: `convert` and
`linear_quantize_weights` are timed apart, in a process of their own. The interpreter runs the
finished package and is held to torch, which runs the decoder with the dequantized codes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from meter import Run, cache_folder, cost_of, watch
from random_llama import SMOLLM, random_llama
from torch import Tensor

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.decoder.model import CachedDecoder
from slimport.export import coreml as container
from slimport.export.container import Deployment
from slimport.export.coreml.package import PACKAGE
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation.runtimes.mil import Interpreter

_LAYERS, _CONTEXT, _LENGTH, _PROMPT, _GENERATED, _RUNS = 30, 1024, 64, 256, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["cost", "interpreter"])
    parser.add_argument("--runs", type=int, default=1, help="of coremltools; 3 of slimport")
    parser.add_argument("--coremltools", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.coremltools:
        print(json.dumps(convert(*options.coremltools)))
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    model = random_llama(_LAYERS, cache_folder(), SMOLLM)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
        if "cost" in options.parts:
            print_cost(model, Path(work), options.runs)
        if "interpreter" in options.parts:
            print_interpreter(model, Path(work))


def print_cost(model: Path, work: Path, runs: int) -> None:
    ours, theirs = work / "slimport", work / "theirs.mlpackage"
    words = f"export {model} --target ios18-gpu --method rtn --no-validate -q --output {ours}"
    commands = {
        "slimport": ([sys.executable, "-m", "slimport", *words.split()], _RUNS),
        "coremltools": ([sys.executable, __file__, "--coremltools", str(model), str(theirs)], runs),
    }
    print(f"{'135M shape':12}{'s':>8}{'CPU-s':>8}{'peak MB':>9}{'package MB':>12}", flush=True)
    for name, (command, times) in commands.items():
        costs: list[Run] = []
        for _ in range(times):
            for place in (ours, theirs):
                shutil.rmtree(place, ignore_errors=True)
            costs.append(watch(command))
        package = ours / "ios18-gpu" / PACKAGE if name == "slimport" else theirs
        print(
            f"{name:12}{median(c.wall for c in costs):8.1f}{median(c.cpu for c in costs):8.1f}"
            f"{max(c.peak for c in costs) / 1e6:9.0f}{_bytes(package) / 1e6:12.1f}",
            flush=True,
        )
    for step, seconds in json.loads(costs[-1].output.splitlines()[-1]).items():
        print(f"  {step}: {seconds:.1f} CPU-s")
    plan = make_plan(decoder_config(Checkpoint.open(model).config), "int4", "rtn")
    held = sum(
        c.grid.bytes_of((c.weight.shape[0], c.weight.shape[1])) for c in plan.quantized if c.grid
    )
    size = _bytes(_package_of(model, work) / PACKAGE)
    print(f"codes and scales {held / 1e6:.1f} MB; the package has {size / held - 1:.2%} more\n")


def convert(model: Path, out: Path) -> dict[str, float]:
    """CPU-seconds of coremltools' two steps."""
    import coremltools
    from coremltools.optimize import coreml as optimize

    mend()
    decoder = _Plain(model, _LENGTH).eval()
    made: list[Any] = []

    def converted() -> None:
        ids = torch.zeros(1, _LENGTH, dtype=torch.int32)
        with torch.no_grad():
            traced = torch.jit.trace(decoder, ids, check_trace=False)
        given = [coremltools.TensorType(name="inputIds", shape=ids.shape, dtype=np.int32)]
        target = coremltools.target.iOS18
        made.append(
            coremltools.convert(
                traced, inputs=given, minimum_deployment_target=target, skip_model_load=True
            )
        )

    def quantized() -> None:
        settings = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
        )
        config = optimize.OptimizationConfig(global_config=settings)
        optimize.linear_quantize_weights(made[0], config).save(str(out))

    steps = {"convert": converted, "linear_quantize_weights": quantized}
    return {name: cost_of(step).cpu for name, step in steps.items()}


def mend() -> None:
    """Let coremltools 9.0 cast a list of one number, which numpy 2.4 refuses to."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast

    def cast(context: Any, node: Any, dtype: Any, name: str) -> None:
        (x,) = ops._get_inputs(context, node, expected=1)
        if not x.can_be_folded_to_const() or isinstance(x.val, dtype):
            original(context, node, dtype, name)
            return
        value = dtype(np.asarray(x.val).reshape(()).item())
        context.add(Builder.const(val=value, name=node.name), node.name)

    ops._cast = cast


class _Plain(torch.nn.Module):
    """transformers' decoder for texts of one length, without a cache."""

    def __init__(self, model: Path, length: int) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ahead = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", torch.zeros(ahead.shape).masked_fill(ahead, -1e4))
        self.register_buffer("places", torch.arange(length)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        given = {"attention_mask": self.mask, "position_ids": self.places, "use_cache": False}
        logits: Tensor = self.model(tokens, **given).logits
        return logits


def print_interpreter(model: Path, work: Path) -> None:
    folder = _package_of(model, work)
    quantized = QuantizedCheckpoint.open(folder / "quantized")
    torch.set_num_threads(2)
    decoder = CachedDecoder(_Codes(quantized), quantized.decoder, _CONTEXT).eval()
    ids = torch.arange(_PROMPT + _GENERATED, dtype=torch.int32)[None] * 7 % 40_000

    def eager(start: int, stop: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = decoder(ids[:, start:stop].long(), torch.tensor([start]))
        return found[0]

    def interpreted(package: Interpreter) -> Callable[[int, int], Tensor]:
        def run(start: int, stop: int) -> Tensor:
            seen = torch.arange(start, stop)[:, None] >= torch.arange(stop)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -65504.0)
            given = {"inputIds": ids[:, start:stop], "fullAttentionMask": mask[None, None]}
            return package.run(given)["logits"][0]

        return run

    runs = {"torch eager": eager}
    for rounding in ("fp32", "fp16"):
        package = Interpreter(folder / PACKAGE, rounding=rounding)  # type: ignore[arg-type]
        runs[f"interpreter {rounding}"] = interpreted(package)
    wanted = eager(0, _PROMPT)
    print(f"{'':18}{'prompt/s':>10}{'tokens/s':>10}{'largest difference':>20}")
    for name, run in runs.items():
        found = run(0, _PROMPT)  # the first run is not timed
        times = sorted(_seconds(run, 0, _PROMPT) for _ in range(_RUNS))
        start = time.perf_counter()
        for place in range(_PROMPT, _PROMPT + _GENERATED):
            run(place, place + 1)
        decode = (time.perf_counter() - start) / _GENERATED
        difference = float((found - wanted).abs().max())
        speed = _PROMPT / times[len(times) // 2]
        print(f"{name:18}{speed:10.1f}{1 / decode:10.2f}{difference:20.2g}", flush=True)


def _seconds(run: Callable[[int, int], Tensor], start: int, stop: int) -> float:
    begin = time.perf_counter()
    run(start, stop)
    return time.perf_counter() - begin


class _Codes:
    """The dequantized codes of a checkpoint."""

    def __init__(self, model: QuantizedCheckpoint) -> None:
        self._model = model

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self._model.rows(name, start, stop)


def _package_of(model: Path, work: Path) -> Path:
    """A folder with the quantized checkpoint and the package, made once."""
    folder = work / "package"
    if not folder.is_dir():
        folder.mkdir()
        checkpoint = Checkpoint.open(model)
        made = quantize(
            checkpoint,
            checkpoint.config,
            make_plan(decoder_config(checkpoint.config), "int4", "rtn"),
            folder / "quantized",
            calibration=None,
            tokenizer_folder=model,
            progress=lambda stage, done, total: None,
        )
        container.write(made, Tokenizer.open(model), folder, Deployment(_CONTEXT))
    return folder


def _bytes(package: Path) -> int:
    return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
