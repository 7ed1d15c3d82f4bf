"""The Core AI container: an .aimodel, for iOS 27 and the macOS of the same year, which are betas.

Apple's converter makes the program from placeholders; codes and scales go from the quantized
checkpoint into the finished file, tensor by tensor. Arithmetic and states are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ...architectures import DecoderConfig
from ...errors import Unsupported
from ...quantize.blocks import Quantized
from ...quantize.grid import Float32
from ...quantize.plan import Plan
from ...quantize.store import QuantizedCheckpoint
from ...tokenizer.tokenizer import Tokenizer
from ..container import Deployment, Minimum, ReadBack
from ..coreml import tokenizer as tokenizer_files
from ..file import sync_folder, write_bytes
from ..merged import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from . import asset, compare, device, layout, packing, reader, sdk
from .conversion import convert
from .device import notes, readme

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

NAME = "coreai"
FILE = asset.PROGRAM
LIBRARIES = (sdk.CORE, sdk.TORCH)
CALIBRATED, PROOF = False, tuple[str, ...]()
ESTIMATED = (asset.PROGRAM,)
_ANY_DIGEST = "sha256:" + "0" * 64
# Of a program, beside its constants: above what models of 1 to 30 layers were measured to have.
_PROGRAM, _PROGRAM_LAYER = 12_000, 18_500


def context_length(config: DecoderConfig) -> int:
    """Windows and ropes are those of the model: nothing shortens it."""
    return config.context_length


def kv_cache(wanted: str) -> str:
    """The states hold what attention computes."""
    return "f32"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported for what was not proven in Apple's runtime; else DependencyMissing."""
    layout.layout(config, plan, 1)
    tokenizer_files.refuse(tokenizer, config.vocab_size)
    sdk.require()


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """Raise Unsupported if the target's iOS has no Core AI."""
    if deployment.ios is not None and deployment.ios < device.IOS:
        raise Unsupported(
            f"iOS {deployment.ios} has no Core AI",
            f"it came with iOS {device.IOS}",
            f"write Core ML: --container coreml, or a newer target: --target ios{device.IOS}",
        )


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}; to the byte, but for the program that Apple's converter makes."""
    placed = layout.layout(config, plan, deployment.context)
    told = device.properties(name, config, tokenizer, deployment.context, _ANY_DIGEST)
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    return {
        asset.PROGRAM: placed.nbytes + _PROGRAM + _PROGRAM_LAYER * config.layers,
        asset.HASH: asset.HASH_BYTES,
        asset.METADATA: len(asset.metadata(told)),
        **{file: len(content) for file, content in beside.items()},
    }


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales, or of its numbers}."""
    return layout.layout(config, plan, 1).bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write program and tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a weight beyond float16.
        ValidationFailed: Apple's converter does not take the model, or changes its weights.
    """
    config, context = model.decoder, deployment.context
    placed = layout.layout(config, model.plan, context)
    skeleton = convert(config, model.plan, placed, context)
    told = device.properties(model.name, config, tokenizer, context, model.weights_digest)
    sizes = {tensor.name: tensor.nbytes for tensor in placed.tensors}
    written = asset.write(
        folder,
        skeleton,
        sizes,
        lambda name: packing.parts(placed.by_name[name], model),
        asset.metadata(told),
    )
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    for name, text in beside.items():
        write_bytes(folder / name, text)
    sync_folder(folder)
    return [*written, *(folder / name for name in beside)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished program, by a reader that shares no code with the packer."""
    return reader.read_back(reader.File(folder), config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`."""
    return compare.check(model, reader.File(folder))


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The first iOS with Core AI."""
    return device.minimum_runtime()
