"""CPU-seconds and seconds of an export, beside ggml's own kernels and beside copying the bytes.

From bf16 safetensors to a finished, fsynced GGUF on two threads, in one run, medians of rounds in
which the candidates take turns. Ours is also hashed and read back; ggml's is only written.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ggml_export import quantize_streamed
from meter import Cost, cost_of, middle, settle
from random_llama import folder_of_all, random_llama

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export import gguf
from slimport.quantize.ggml import Type
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.tokenizer import Tokenizer

_THREADS = 2
_CHUNK = 1 << 22  # bytes copied at a time


class Export:
    """One model and a folder to work in; each method is a candidate that is timed."""

    def __init__(self, model: Path, work: Path) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.tokenizer = Tokenizer.open(model)
        self.work = work
        self.model = model

    def by_slimport(self, method: str) -> None:
        """What `slimport export --no-validate` does with the weights."""
        quantized = self.quantize(method)
        gguf.write(quantized, self.tokenizer, self.work)
        read_back = gguf.check(quantized, self.work)
        assert read_back.weights_digest == quantized.weights_digest

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

    def by_ggml(self, kind: Type) -> None:
        config = decoder_config(self.checkpoint.config)
        plan, path = make_plan(config, method="rtn"), self.work / "peer.gguf"
        quantize_streamed(
            self.checkpoint, config, plan, self.tokenizer, kind, path, _THREADS
        )

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
    parser.add_argument("--folder", type=Path, default=folder_of_all(), help="for large files")
    options = parser.parse_args()
    export = Export(random_llama(options.layers, options.folder), options.folder / "speed")
    warm = Export(random_llama(1, options.folder), export.work)
    export.work.mkdir(exist_ok=True)
    candidates: dict[str, Callable[[], None]] = {
        "slimport rtn, scale search": partial(export.by_slimport, "rtn"),
        "ggml Q4_K": partial(export.by_ggml, Type.Q4_K),
        "slimport rtn-absmax, no search": partial(export.by_slimport, "rtn-absmax"),
        "ggml Q4_0": partial(export.by_ggml, Type.Q4_0),
        "copy the GGUF": export.copy,
        "read the safetensors, copy the GGUF": export.read_and_copy,
    }
    for method in ("rtn", "rtn-absmax"):  # compiled, or loaded from the compiler's cache
        warm.by_slimport(method)
    costs: dict[str, list[Cost]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, candidate in candidates.items():
            settle()
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
    search, k_quant, absmax, q4_0, copied, read = costs.values()
    print(f"ggml Q4_K / slimport with search, CPU:     {k_quant.cpu / search.cpu:.2f} (aim 3)")
    print(f"ggml Q4_0 / slimport without search, CPU:  {q4_0.cpu / absmax.cpu:.2f} (aim 1)")
    print(f"slimport with search / copy, wall:         {search.wall / copied.wall:.2f} (aim 2)")
    print(f"slimport with search / read and copy:      {search.wall / read.wall:.2f}")


if __name__ == "__main__":
    main()
