"""KL divergence at 4.5 bits per weight, beside ggml's own quantizers with the same tables.

Every row is a real file, run in llama.cpp (f16 KV cache) against transformers in float32 on
held-out text. Only the Linears differ: tables are int8-row in all of them. ggml's importance
matrix is the mean of x^2 over the very windows that GPTQ is calibrated on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from ggml_export import Imatrix, linear_bytes, linear_weights, write_peer

from slimport.architectures import DecoderConfig, check_weights, decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import Unsupported
from slimport.export import gguf
from slimport.quantize.calibration import layer_statistics
from slimport.quantize.ggml import Type, row_bytes
from slimport.quantize.plan import FLOAT, Plan, make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint
from slimport.quantize.windows import Windows, read_text, token_windows
from slimport.tokenizer.tokenizer import Tokenizer
from slimport.validation import divergence
from slimport.validation.divergence import Divergence
from slimport.validation.runtimes import llamacpp, reference
from slimport.validation.runtimes.reference import Oracle

_STORYTELLER = Path(__file__).parents[1] / "examples" / "storyteller"
_EXAMPLE = (
    str(_STORYTELLER / "base"),
    str(_STORYTELLER / "data" / "calibration.txt"),
    str(_STORYTELLER / "data" / "held_out.txt"),
)
_OURS = (
    ("gptq int4-g32", "int4", "gptq"),
    ("gptq int4-g32-signed", "int4-signed", "gptq"),
    ("rtn int4-g32", "int4", "rtn"),
    ("rtn int4-g32-signed", "int4-signed", "rtn"),
    ("rtn-absmax int4-g32", "int4", "rtn-absmax"),
)
_PEERS = (
    (Type.Q4_0, False),
    (Type.Q4_0, True),
    (Type.Q4_K, False),
    (Type.Q4_K, True),
    (Type.IQ4_NL, True),
    (Type.IQ4_XS, True),
)
_ONLY_TABLES = MappingProxyType({"model.layers.*": FLOAT})


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its texts; `oracle` is a file of its logits on the held-out windows."""

    checkpoint: Checkpoint
    decoder: DecoderConfig
    tokenizer: Tokenizer
    calibration: Windows
    held_out: Windows
    oracle: Path
    work: Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; no divergence: the type cannot hold these rows."""

    kind: str
    nbytes: int = 0
    bits: float = 0.0
    found: Divergence | None = None


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
    parser.add_argument("--length", type=int, default=512, help="tokens in a window, at most")
    options = parser.parse_args()
    for model, calibration, held_out in options.case or [_EXAMPLE]:
        absent = [path for path in (model, calibration, held_out) if not Path(path).exists()]
        if absent:
            print(f"{model}: skipped, there is no {absent[0]}\n")
            continue
        with tempfile.TemporaryDirectory() as work:
            counts = options.calibration_windows, options.windows, options.length
            case = open_case(Path(model), Path(calibration), Path(held_out), Path(work), *counts)
            print_table(case)


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
    oracle = work / "oracle.npy"
    reference.logits(Oracle(model), texts[1].ids, oracle)
    return Case(checkpoint, decoder, tokenizer, *texts, oracle, work)


def print_table(case: Case) -> None:
    """Each line as soon as it is known; the first one is what the others are compared with."""
    print(
        f"{case.checkpoint.name}: {case.held_out.ids.size:,} held-out tokens, "
        f"calibrated on {case.calibration.ids.size:,}\n"
        f"{'type':26}{'bytes':>10}{'bpw':>7}{'KL mean':>11}{'+-':>10}"
        f"{'99.9%':>9}{'top-1':>8}{'ratio':>7}"
    )
    ours: float | None = None
    for row in measure(case):
        found = row.found
        if found is None:
            print(f"{row.kind:26}       n/a: its rows do not divide into blocks")
            continue
        ours = ours or found.kl_mean
        print(
            f"{row.kind:26}{row.nbytes:10,}{row.bits:7.3f}{found.kl_mean:11.6f}"
            f"{found.kl_mean_error or 0:10.6f}{found.kl_p999:9.4f}{found.top1:8.4f}"
            f"{found.kl_mean / ours:7.2f}",
            flush=True,
        )
    print()


def measure(case: Case) -> Iterator[Row]:
    for kind, preset, method in _OURS:
        quantized = _ours(case, make_plan(case.decoder, preset, method))
        yield _row(case, kind, quantized.plan, None)
    imatrix = importance(case)
    plan = make_plan(case.decoder, "int4", "rtn")
    quantized = _ours(case, plan)
    for kind, weighted in _PEERS:
        name = f"ggml {kind.name}" + (" + imatrix" if weighted else "")
        if not _fits(plan, kind):
            yield Row(name)
            continue
        path = case.work / gguf.FILE
        write_peer(
            quantized, case.checkpoint, case.tokenizer, kind, path, imatrix if weighted else None
        )
        yield _row(case, name, plan, kind)
    tables = _ours(case, make_plan(case.decoder, "int4", "rtn", _ONLY_TABLES))
    yield _row(case, "float16", tables.plan, None)


def importance(case: Case) -> Imatrix:
    """Mean of x^2 of every input of every Linear, in full precision as llama-imatrix does."""
    found: dict[str, np.ndarray] = {}
    with closing(layer_statistics(case.checkpoint, case.decoder, case.calibration)) as stream:
        for _ in range(case.decoder.layers):
            _, statistics = stream.send({}) if found else next(stream)
            found |= {name: s.hessian.diagonal().copy() for name, s in statistics.items()}
    return found


def _ours(case: Case, plan: Plan) -> QuantizedCheckpoint:
    """Quantize by `plan` and write the file."""
    quantized = quantize(
        case.checkpoint,
        case.checkpoint.config,
        plan,
        case.work / "quantized",
        calibration=case.calibration,
        tokenizer_folder=case.checkpoint.folder,
        progress=lambda stage, done, total: None,
    )
    gguf.write(quantized, case.tokenizer, case.work)
    return quantized


def _row(case: Case, name: str, plan: Plan, kind: Type | None) -> Row:
    """Judge the file that was just written."""
    artifact = case.work / "artifact.npy"
    llamacpp.logits(case.work / gguf.FILE, case.held_out.ids, artifact)
    found = divergence.compare(case.oracle, artifact, case.held_out.ids)
    nbytes = linear_bytes(case.decoder, plan, kind)
    return Row(name, nbytes, 8 * nbytes / linear_weights(plan), found)


def _fits(plan: Plan, kind: Type) -> bool:
    columns = {c.weight.shape[1] for c in plan.choices if c.weight.is_linear}
    try:
        return all(row_bytes(kind, count) > 0 for count in columns)
    except Unsupported:
        return False


if __name__ == "__main__":
    main()
