"""The Core ML container for the Neural Engine: packages of fixed shapes.

Each has two functions over the same weights: one for a chunk of a prompt, one for one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ...architectures import DecoderConfig
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment, Minimum, ReadBack
from ..coreml import FILE, compare, package, packing, reader, refuse_deployment
from ..coreml import tokenizer as tokenizer_files
from ..coreml.adapter import (
    Factor,
    check_adapter,
    factors,
    function_of,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from ..coreml.device import notes
from ..coreml.layout import IOS18
from ..file import sync_folder, write_bytes
from . import device, layout
from .decoder import decoder_function
from .layout import CHUNK, Part

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

NAME = "coreml-ane"
LIBRARIES = ("coremltools", "protobuf")
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()
DECODE, PREFILL = "decode", "prefill"
_VECTORS = "<f2"
_ANY_DIGEST = "sha256:" + "0" * 64


def context_length(config: DecoderConfig) -> int:
    """Up to the longest dimension that the Neural Engine takes."""
    return min(config.context_length, layout.LONGEST)


def kv_cache(wanted: str) -> str:
    """Core ML has no other states."""
    return "f16"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if the Neural Engine does not compute this exactly."""
    layout.parts(config, plan, Deployment(1))
    tokenizer_files.refuse(tokenizer, config.vocab_size)


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte; `name` is the model's."""
    sizes: dict[str, int] = {}
    for part, content in _models(config, plan, tokenizer, name, deployment, _ANY_DIGEST):
        sizes |= package.sizes(content, part.layout.nbytes, part.name)
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    return sizes | {file: len(content) for file, content in beside.items()}


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales or levels, or of its numbers}."""
    found: dict[str, int] = {}
    for part in layout.parts(config, plan, Deployment(1)):
        for name, size in part.layout.bytes_by_weight().items():
            found[name] = found.get(name, 0) + size
    return found


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write packages and tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float weight beyond float16.
    """
    config, plan = model.decoder, model.plan
    written: list[Path] = []
    digest = model.weights_digest
    held = {each.stored.name: each.values for each in _factors(config, deployment)}
    for part, content in _models(config, plan, tokenizer, model.name, deployment, digest):
        start, tensors = packing.head(part.layout), packing.data(model, part.layout, held)
        written += package.write(folder, content, start, tensors, part.name)
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    for name, text in beside.items():
        write_bytes(folder / name, text)
    sync_folder(folder)
    return [*written, *(folder / name for name in beside)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished packages, by a reader that shares no code with the packer."""
    return reader.read_back(_files(folder), config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale, level and value with `model`; Apple's library reads them too."""
    return compare.check(model, _files(folder), _VECTORS)


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The iOS that has the operations of the packages."""
    return Minimum("iOS", str(IOS18.version), "states, and functions that share weights")


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md: how to load it on the device, with code."""
    return device.readme(fields, adapters)


def _files(folder: Path) -> list[reader.File]:
    """The packages in `folder`, in the order in which they run."""
    return [reader.File(folder / name, _VECTORS) for name in package.packages_in(folder)]


def _models(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    name: str,
    deployment: Deployment,
    digest: str,
) -> Iterator[tuple[Part, bytes]]:
    """The packages and their model files."""
    parts = layout.parts(config, plan, deployment, _factors(config, deployment))
    told = device.properties(name, config, tokenizer, deployment.context, digest, len(parts))
    adapted = [None, *(function_of(each.adapter) for each in deployment.adapters)]
    for part in parts:
        functions = {
            function_name(role, each): decoder_function(
                config, part, deployment.context, tokens, IOS18, each
            )
            for each in adapted
            for role, tokens in ((DECODE, 1), (PREFILL, CHUNK))
        }
        yield part, package.model_bytes(functions, IOS18, told)


def function_name(role: str, adapted: str | None) -> str:
    """Of the function of an adapter for a chunk of a prompt, or for one token."""
    return role if adapted is None else f"{role}_{adapted}"


def _factors(config: DecoderConfig, deployment: Deployment) -> Iterator[Factor]:
    for separate in deployment.adapters:
        yield from factors(separate, config)
