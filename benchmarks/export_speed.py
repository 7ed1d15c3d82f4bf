"""CPU-seconds and seconds of an export, beside ggml's own kernels and beside copying the bytes.

From bf16 safetensors to a finished, fsynced GGUF on two threads, in one run, medians of rounds in
which the candidates take turns. An export also keeps the quantized checkpoint, hashes every code
twice and reads the file back; what is "write only" reads, quantizes, writes and fsyncs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ggml_export import Kernel, ggml_kernel, our_kernel, write_streamed
from meter import Cost, cache_folder, cost_of, middle
from random_llama import random_llama

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export import gguf
from slimport.quantize.ggml import Type
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer.tokenizer import Tokenizer

_THREADS = 2
_CHUNK = 1 << 22  # bytes copied at a time


class Export:
    """One model and a folder to work in; each method is a candidate that is timed."""

    def __init__(self, model: Path, work: Path) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.tokenizer = Tokenizer.open(model)
        self.work = work
        self.model = model

    def clear(self, everything: bool) -> None:
        """Remove what earlier candidates wrote, the finished GGUF only with `everything`."""
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif everything or path.name != gguf.FILE:
                path.unlink()
        os.sync()  # so that nobody waits for what another one left to the disk

    def by_slimport(self, method: str) -> None:
        """What `slimport export --no-validate` does with the weights."""
        quantized = self.quantize(method)
        gguf.write(quantized, self.tokenizer, self.work)
        read_back = gguf.check(quantized, self.work)
        assert read_back.weights_digest == quantized.weights_digest

    def by_command(self, method: str) -> None:
        """The command itself, Python's start included."""
        output = str(self.work / "dist")
        command = [sys.executable, "-m", "slimport", "export", str(self.model), "--no-validate"]
        command += ["--target", "android", "--method", method, "--output", output, "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def quantize(self, method: str) -> QuantizedCheckpoint:
        config = self.checkpoint.config
        return quantize(
            self.checkpoint,
            config,
            make_plan(decoder_config(config), method=method),
            self.work / "quantized",
            calibration=None,
            tokenizer_folder=self.model,
            progress=lambda stage, done, total: None,
        )

    def stream(self, kind: Type, kernel: Kernel) -> None:
        """Read, quantize, write and fsync, and nothing else."""
        config = decoder_config(self.checkpoint.config)
        plan, path = make_plan(config, method="rtn"), self.work / "streamed.gguf"
        write_streamed(self.checkpoint, config, plan, self.tokenizer, kind, kernel, path, _THREADS)

    def copy(self) -> None:
        """The finished GGUF, copied and fsynced."""
        _copy(self.work / gguf.FILE, self.work / "copy.gguf")

    def read_and_copy(self) -> None:
        """The same, after reading every byte of the source once."""
        for shard in sorted(self.model.glob("*.safetensors")):
            with shard.open("rb") as file:
                while file.read(_CHUNK):
                    pass
        self.copy()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, _CHUNK)
        writing.flush()
        os.fsync(writing.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="for large files")
    options = parser.parse_args()
    export = Export(random_llama(options.layers, options.folder), options.folder / "speed")
    warm = Export(random_llama(1, options.folder), export.work)
    export.clear(everything=True)
    exports: dict[str, Callable[[], None]] = {
        "slimport export --no-validate, rtn": partial(export.by_command, "rtn"),
        "export, rtn with scale search": partial(export.by_slimport, "rtn"),
        "export, rtn-absmax": partial(export.by_slimport, "rtn-absmax"),
    }
    others: dict[str, Callable[[], None]] = {
        "write only, ggml Q4_K": partial(export.stream, Type.Q4_K, ggml_kernel),
        "write only, ggml Q4_0": partial(export.stream, Type.Q4_0, ggml_kernel),
        "write only, rtn-absmax": partial(export.stream, Type.Q4_0, our_kernel),
        "copy the GGUF": export.copy,
        "read the safetensors, copy the GGUF": export.read_and_copy,
    }
    for method in ("rtn", "rtn-absmax"):  # compiled, or loaded from the compiler's cache
        warm.by_slimport(method)
    costs: dict[str, list[Cost]] = {name: [] for name in exports | others}
    for _ in range(options.rounds):
        for name, candidate in (exports | others).items():
            export.clear(everything=name in exports)
            costs[name].append(cost_of(candidate))
    _report(export, {name: middle(taken) for name, taken in costs.items()}, costs)
    shutil.rmtree(export.work)


def _report(export: Export, costs: dict[str, Cost], every: dict[str, list[Cost]]) -> None:
    source = sum(path.stat().st_size for path in export.model.glob("*.safetensors"))
    written = (export.work / gguf.FILE).stat().st_size
    print(f"{export.model.name}: {source / 1e9:.2f} GB bf16 > {written / 1e6:.0f} MB GGUF")
    print(f"{'median of rounds':38}{'CPU-s':>8}{'wall s':>8}   rounds: CPU-s / wall s")
    for name, cost in costs.items():
        rounds = ", ".join(f"{c.cpu:.1f}/{c.wall:.1f}" for c in every[name])
        print(f"{name:38}{cost.cpu:8.2f}{cost.wall:8.2f}   {rounds}")
    command, search, absmax, k_quant, q4_0, ours, copied, read = costs.values()
    for what, ratio in (
        ("CPU, ggml Q4_K written / export with search (aim 3)", k_quant.cpu / search.cpu),
        ("CPU, ggml Q4_K written / the whole command", k_quant.cpu / command.cpu),
        ("CPU, ggml Q4_0 written / rtn-absmax written (aim 1)", q4_0.cpu / ours.cpu),
        ("CPU, ggml Q4_0 written / whole export without search", q4_0.cpu / absmax.cpu),
        ("wall, export with search / copy of the GGUF (aim 2)", search.wall / copied.wall),
        ("wall, the whole command / copy of the GGUF", command.wall / copied.wall),
        ("wall, export with search / read the source, copy", search.wall / read.wall),
    ):
        print(f"{what:56}{ratio:6.2f}")


if __name__ == "__main__":
    main()
