"""The ExecuTorch container: a program for the CPU that the stock runners of Android and iOS load.

It is written as it stands, and not lowered from a traced model: in a second, with one tensor in
memory, and with the codes of the quantized checkpoint in XNNPACK's own layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ...adapters.adapter import Adapter
from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment, Minimum, ReadBack, foreign_adapter
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from . import compare, device, layout, packing, program, reader
from .decoder import decoder_method
from .device import notes, readme
from .tokenizer import TOKENIZER, refuse_tokenizer, tokenizer_json

__all__ = [
    "CALIBRATED",
    "ESTIMATED",
    "FILE",
    "LIBRARIES",
    "NAME",
    "PROOF",
    "check",
    "check_adapter",
    "context_length",
    "kv_cache",
    "minimum_runtime",
    "notes",
    "predict",
    "predict_adapter",
    "read_back",
    "readme",
    "refuse",
    "refuse_adapter",
    "refuse_deployment",
    "refuse_foreign_adapter",
    "tensor_bytes",
    "write",
    "write_adapter",
]

NAME = "executorch"
FILE = reader.MODEL
LIBRARIES = ("flatbuffers",)
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()
_ANY_DIGEST = "0" * 64
_DIGEST = 16  # hexadecimal digits of a weight's digest in its key


def context_length(config: DecoderConfig) -> int:
    """Windows and ropes are those of the model: nothing shortens it."""
    return config.context_length


def kv_cache(wanted: str) -> str:
    """The cache holds what attention computes."""
    return "f32"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if XNNPACK, a kernel or the runner cannot hold this exactly.

    BadInput for a tokenizer with more tokens than the model.
    """
    layout.layout(config, plan, Deployment(1))
    refuse_tokenizer(tokenizer, config.vocab_size)


def refuse_deployment(deployment: Deployment) -> None:
    """Raise Unsupported for separate adapters."""
    if deployment.adapted:
        raise _no_adapters("ExecuTorch programs do not take separate adapters")


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte."""
    placed = layout.layout(config, plan, deployment)
    digests = {choice.weight.name: _ANY_DIGEST for choice in plan.choices}
    head = _head(config, placed, tokenizer, deployment, digests)
    return {
        FILE: len(head) + placed.layout.nbytes,
        TOKENIZER: len(tokenizer_json(tokenizer)),
    }


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales, or of its numbers}."""
    return layout.layout(config, plan, Deployment(1)).layout.bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write program and tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float table beyond float16.
    """
    config = model.decoder
    placed = layout.layout(config, model.plan, deployment)
    digests = {name: record.digest for name, record in model.records.items()}
    head = _head(config, placed, tokenizer, deployment, digests)
    write_bytes(folder / TOKENIZER, tokenizer_json(tokenizer))
    write_aligned(folder / FILE, head, _data(model, placed), ALIGNMENT)
    return [folder / FILE, folder / TOKENIZER]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished file, by a reader that shares no code with the packer."""
    return reader.read_back(folder, config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`."""
    return compare.check(model, folder)


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported: programs with adapters beside them are not written."""
    raise _no_adapters(f"the adapter {adapter.name} cannot stay separate")


def predict_adapter(adapter: Adapter, config: DecoderConfig) -> dict[str, int]:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(f"the adapter {adapter.name} cannot stay separate")


def write_adapter(
    adapter: Adapter, config: DecoderConfig, folder: Path, base: str, scale: float = 1.0
) -> Path:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(f"the adapter {adapter.name} cannot stay separate")


def check_adapter(
    path: Path, adapter: Adapter, config: DecoderConfig, base: str, scale: float = 1.0
) -> None:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(f"the adapter {adapter.name} cannot stay separate")


def refuse_foreign_adapter(path: Path, base: str) -> None:
    """Raise BadInput: a bundle of this container has no adapters."""
    raise foreign_adapter(path, "an ExecuTorch program takes no adapters")


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The release of ExecuTorch that was tried."""
    return device.minimum_runtime()


def _head(
    config: DecoderConfig,
    placed: layout.Placed,
    tokenizer: Tokenizer,
    deployment: Deployment,
    digests: Mapping[str, str],
) -> bytes:
    """The file up to its tensors.

    XNNPACK may share what it packed between programs by key, so that a key says what it holds.
    """
    keys = {
        tensor.name: f"{tensor.name}:{digests[tensor.choices[0].weight.name][:_DIGEST]}"
        for tensor in placed.layout.tensors
        if tensor.choices
    }
    context = deployment.context
    methods = [
        decoder_method(config, placed, context, keys, all_logits=every) for every in (False, True)
    ]
    data = program.Data(placed.layout.tensors, placed.layout.nbytes, placed.constants, keys)
    return program.serialize(methods, device.metadata(config, tokenizer, context), data)


def _data(
    model: QuantizedCheckpoint, placed: layout.Placed
) -> Iterator[tuple[str, int, Iterable[npt.NDArray[Any]]]]:
    """Name, bytes and content of every tensor."""
    for tensor in placed.layout.tensors:
        yield tensor.name, tensor.nbytes, packing.parts(tensor, model)


def _no_adapters(what: str) -> Unsupported:
    return Unsupported(
        what,
        "programs that share a base with adapters are not written yet",
        "merge it: --adapter-mode merged, one bundle for each adapter; or --container gguf, onnx",
    )
