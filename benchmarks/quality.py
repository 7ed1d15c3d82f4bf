"""KL divergence by type and method: ggml's kernels beside ours, at the same bytes.

Every row is a real file, run in llama.cpp (f16 KV cache but where another is named) against
transformers in float32 on held-out text. Only the Linears differ: tables are int8-row in all files
but those of a mix, which has tables of its own. ggml's importance matrix is the mean of x^2 over
the very windows that GPTQ is calibrated on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from slimport.architectures import DecoderConfig, check_weights, decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export import gguf
from slimport.quantize import blocks
from slimport.quantize.blocks import BLOCK_GRIDS, BlockGrid, Quantized
from slimport.quantize.calibration import importance
from slimport.quantize.codes import CODES
from slimport.quantize.ggml import NEEDS_IMPORTANCE
from slimport.quantize.grid import Float32
from slimport.quantize.imatrix import Imatrix
from slimport.quantize.methods import rtn
from slimport.quantize.plan import FLOAT, Choice, Plan, make_plan
from slimport.quantize.quantizer import quantize, restore
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.subscales import LAYOUTS
from slimport.quantize.windows import Windows, read_text, token_windows
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import divergence
from slimport.validation.divergence import Divergence
from slimport.validation.runtimes import llamacpp, reference
from slimport.validation.runtimes.reference import Oracle

_FOLDER = Path(__file__).parents[1] / "examples" / "storyteller"
STORYTELLER = (
    str(_FOLDER / "base"),
    str(_FOLDER / "data" / "calibration.txt"),
    str(_FOLDER / "data" / "held_out.txt"),
)
# What every Linear becomes, and the type of ggml that its ratio is to.
_GRIDS = {
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K": "Q5_K",
    "Q4_K": "Q4_K",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "int4-g32": "Q4_K",
    "int4-g32-signed": "Q4_K",
    "IQ4_XS": "IQ4_XS",
    "Q3_K": "Q3_K",
    "IQ3_S": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "Q2_K": "Q2_K",
    "IQ2_S": "IQ2_S",
    "IQ2_XS": "IQ2_XS",
    "int2-g64": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "int2-g256": "IQ2_XXS",
}
_MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
LINEARS = "model.layers.*"


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its texts.

    Attributes:
        importance: measured on `calibration`, once for all rows.
        oracle: a file of the model's logits on the held-out windows.
    """

    checkpoint: Checkpoint
    decoder: DecoderConfig
    tokenizer: Tokenizer
    calibration: Windows
    importance: Imatrix
    held_out: Windows
    oracle: Path
    work: Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        peer: the type that `ratio` is to.
        nbytes, bits: of the Linears; of all matrices for a mix.
        seconds: of quantizing; for gptq with calibration, for ggml without the importance matrix.
    """

    kind: str
    method: str
    peer: str
    nbytes: int
    bits: float
    seconds: float
    found: Divergence


Solver = Callable[[Case, Plan], QuantizedCheckpoint]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case",
        nargs=3,
        action="append",
        metavar=("MODEL", "CALIBRATION", "HELD_OUT"),
        help="a model folder and two texts; of one text given twice the first half calibrates "
        "(default: the storyteller example)",
    )
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--grids", nargs="*", help="only these types and mixes")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window, at most")
    options = parser.parse_args()
    for model, calibration, held_out in options.case or [STORYTELLER]:
        absent = [path for path in (model, calibration, held_out) if not Path(path).exists()]
        if absent:
            print(f"{model}: skipped, there is no {absent[0]}\n")
            continue
        with tempfile.TemporaryDirectory() as work:
            counts = options.calibration_windows, options.windows, options.length
            case = open_case(Path(model), Path(calibration), Path(held_out), Path(work), *counts)
            print_table(case, options.grids)


def open_case(
    model: Path,
    calibration: Path,
    held_out: Path,
    work: Path,
    calibration_windows: int,
    windows: int,
    length: int,
) -> Case:
    checkpoint, tokenizer = Checkpoint.open(model), Tokenizer.open(model)
    decoder = decoder_config(checkpoint.config)
    check_weights(decoder, checkpoint)
    length = min(length, decoder.context_length)
    first, second = (read_text(path, tokenizer.render_chat) for path in (calibration, held_out))
    if calibration == held_out:
        first, second = first[: len(first) // 2], second[len(second) // 2 :]
    texts = [
        token_windows(text, tokenizer, length, count, vocab_size=decoder.vocab_size)
        for text, count in ((first, calibration_windows), (second, windows))
    ]
    matrix = importance(checkpoint, decoder, texts[0], lambda stage, done, total: None)
    oracle = work / "oracle.npy"
    reference.logits(Oracle(model), texts[1].ids, oracle)
    return Case(checkpoint, decoder, tokenizer, texts[0], matrix, texts[1], oracle, work)


def print_table(case: Case, wanted: list[str] | None) -> None:
    """Each line as soon as it is known."""
    print(
        f"{case.checkpoint.name}: {case.held_out.ids.size:,} held-out tokens, "
        f"calibrated on {case.calibration.ids.size:,}\n"
        f"{'type':16}{'method':15}{'bytes':>11}{'bpw':>7}{'KL mean':>11}{'+-':>10}"
        f"{'99.9%':>9}{'top-1':>8}{'s':>6}{'ratio':>7}"
    )
    peers: dict[str, float] = {}
    for row in measure(case, wanted):
        found = row.found
        if row.method == "ggml + imatrix":
            peers[row.kind] = found.kl_mean
        ratio = f"{found.kl_mean / peers[row.peer]:7.2f}" if row.peer in peers else f"{'-':>7}"
        print(
            f"{row.kind:16}{row.method:15}{row.nbytes:11,}{row.bits:7.3f}{found.kl_mean:11.6f}"
            f"{found.kl_mean_error or 0:10.6f}{found.kl_p999:9.4f}{found.top1:8.4f}"
            f"{row.seconds:6.1f}{ratio}",
            flush=True,
        )
    print()


def measure(case: Case, wanted: list[str] | None) -> Iterator[Row]:
    for kind, peer in _GRIDS.items():
        if wanted and kind not in wanted:
            continue
        for name, method, solve in _candidates(kind):
            plan = make_plan(case.decoder, "int4", method, {LINEARS: kind})
            if any(c.grid is None for c in plan.choices if c.weight.is_linear):
                print(f"{kind:16}n/a: its rows do not divide into blocks")
                break
            row = _row(case, kind, name, peer, plan, solve)
            yield row
            if (kind, name) == ("int4-g32", "gptq"):
                for cache in ("q8_0", "q4_0"):
                    yield replace(row, method=f"gptq, KV {cache}", found=judged(case, cache))
    for mix in _MIXES:
        if wanted and mix not in wanted:
            continue
        for name, method in (("ggml + imatrix", "imatrix"), ("gptq", "gptq")):
            plan = make_plan(case.decoder, mix, method)
            yield _row(case, f"mix {mix}", name, f"mix {mix}", plan, _by_slimport)
    floats = make_plan(case.decoder, "int4", "rtn", {LINEARS: FLOAT})
    yield _row(case, "float16", "", "", floats, _by_slimport)


def _candidates(kind: str) -> Iterator[tuple[str, str, Solver]]:
    """Name in the table, method of the plan, who quantizes."""
    grid = BLOCK_GRIDS.get(kind)
    if grid is not None:
        if grid.type not in NEEDS_IMPORTANCE:
            yield "ggml", "rtn", _by_ggml
        yield "ggml + imatrix", "imatrix", _by_slimport
    if grid is None or grid.type in LAYOUTS:
        yield "rtn", "rtn", _by_slimport
    if grid is None or grid.type in CODES:
        yield "gptq", "gptq", _by_slimport


def _by_slimport(case: Case, plan: Plan) -> QuantizedCheckpoint:
    return quantize(
        case.checkpoint,
        case.checkpoint.config,
        plan,
        case.work / "quantized",
        calibration=case.calibration if plan.uses("gptq") else case.importance,
        tokenizer_folder=case.checkpoint.folder,
        progress=lambda stage, done, total: None,
    )


def _by_ggml(case: Case, plan: Plan) -> QuantizedCheckpoint:
    """ggml's kernel for its types, without an importance matrix; `rtn` for tables."""

    def solve(choice: Choice) -> Quantized | Float32:
        values = case.checkpoint.rows(choice.weight.name)
        if choice.grid is None:
            return values
        if isinstance(choice.grid, BlockGrid):
            return blocks.solve(values, choice.grid)
        return rtn.solve(values, choice.grid)

    return restore(
        ((choice.weight.name, solve(choice)) for choice in plan.choices),
        case.checkpoint.config,
        plan,
        case.work / "quantized",
        tokenizer_folder=case.checkpoint.folder,
    )


def _row(case: Case, kind: str, method: str, peer: str, plan: Plan, solve: Solver) -> Row:
    """Quantize, write and judge one file."""
    started = time.perf_counter()
    quantized = solve(case, plan)
    seconds = time.perf_counter() - started
    gguf.write(quantized, case.tokenizer, case.work)
    found = judged(case)
    sizes = gguf.tensor_bytes(case.decoder, plan)
    counted = [
        choice.weight
        for choice in plan.choices
        if choice.weight.is_linear or (kind.startswith("mix") and choice.weight.is_matrix)
    ]
    nbytes = sum(sizes[weight.name] for weight in counted)
    bits = 8 * nbytes / sum(prod(weight.shape) for weight in counted)
    return Row(kind, method, peer, nbytes, bits, seconds, found)


def judged(case: Case, kv_cache: str = "f16") -> Divergence:
    """The file that was written last, in llama.cpp."""
    artifact = case.work / "artifact.npy"
    llamacpp.logits(case.work / gguf.FILE, case.held_out.ids, artifact, kv_cache=kv_cache)
    return divergence.compare(case.oracle, artifact, case.held_out.ids)


if __name__ == "__main__":
    main()
