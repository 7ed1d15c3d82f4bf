"""The Core ML container: a package that iPhones and Macs run, written without coremltools.

Flexible lengths and float16, for the GPU and the CPU. The program is written as it stands and not
converted: weights go from the quantized checkpoint into the package, tensor by tensor.
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
from ..file import sync_folder, write_bytes
from ..layout import Layout
from . import adapter, compare, device, layout, package, packing, reader
from . import tokenizer as tokenizer_files
from .adapter import (
    check_adapter,
    predict_adapter,
    refuse_adapter,
    refuse_foreign_adapter,
    write_adapter,
)
from .decoder import decoder_function, reward_function
from .device import notes

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

NAME = "coreml"
FILE = package.paths().model
LIBRARIES = ("coremltools", "protobuf")
CALIBRATED, PROOF, ESTIMATED = False, tuple[str, ...](), tuple[str, ...]()
_ANY_DIGEST = "sha256:" + "0" * 64


def context_length(config: DecoderConfig) -> int:
    """Windows and ropes are those of the model: nothing shortens it."""
    return config.context_length


def kv_cache(wanted: str) -> str:
    """Core ML has no other states."""
    return "f16"


def refuse(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise Unsupported if no operation of Core ML holds this exactly."""
    layout.layout(config, plan, Deployment(1))
    tokenizer_files.refuse(tokenizer, config.vocab_size)


def refuse_deployment(plan: Plan, deployment: Deployment) -> None:
    """Raise Unsupported if the target's iOS lacks an operation, or adapters share a name."""
    adapter.refuse_same_names(deployment.adapters)
    release = layout.release_of(plan)
    if deployment.ios is not None and deployment.ios < release.version:
        grid = next(c.grid.name for c in plan.choices if c.grid and layout.is_chain(c))
        raise Unsupported(
            f"iOS {deployment.ios} cannot decompress the grid {grid}",
            f"it is a look-up table times scales, which iOS {release.version} brought",
            "choose another preset, such as --preset int4, or a newer target: --target ios26",
        )


def predict(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, name: str, deployment: Deployment
) -> dict[str, int]:
    """{file name: bytes}, to the byte; `name` is the model's."""
    placed = _placed(config, plan, deployment)
    model = _model(config, plan, tokenizer, name, deployment, placed, _ANY_DIGEST)
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    sizes = {file: len(content) for file, content in beside.items()}
    return package.sizes(model, placed.nbytes) | sizes


def tensor_bytes(config: DecoderConfig, plan: Plan) -> dict[str, int]:
    """{source name: bytes of its codes and scales, or of its numbers}."""
    return layout.layout(config, plan, Deployment(1)).bytes_by_weight()


def write(
    model: QuantizedCheckpoint, tokenizer: Tokenizer, folder: Path, deployment: Deployment
) -> list[Path]:
    """Write package and tokenizer, and fsync them.

    Raises:
        Unsupported: as `refuse`, or a float matrix beyond float16.
    """
    config, plan = model.decoder, model.plan
    placed, digest = _placed(config, plan, deployment), model.weights_digest
    content = _model(config, plan, tokenizer, model.name, deployment, placed, digest)
    factors = {factor.stored.name: factor.values for factor in _factors(config, deployment)}
    tensors = packing.data(model, placed, factors)
    written = package.write(folder, content, packing.head(placed), tensors)
    beside = tokenizer_files.files(tokenizer, config.family.model_type)
    for name, text in beside.items():
        write_bytes(folder / name, text)
    sync_folder(folder)
    return [*written, *(folder / name for name in beside)]


def read_back(
    folder: Path, config: DecoderConfig, grids: Mapping[str, str]
) -> Iterator[tuple[str, Quantized | Float32]]:
    """Every weight of the finished package, by a reader that shares no code with the packer."""
    return reader.read_back([reader.File(folder / package.PACKAGE)], config, grids)


def check(model: QuantizedCheckpoint, folder: Path) -> ReadBack:
    """Compare every code, scale and value with `model`; Apple's library reads them too."""
    return compare.check(model, [reader.File(folder / package.PACKAGE)])


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The iOS that has the operations of the package."""
    return device.minimum_runtime(plan)


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md: how to load it on the device, with code."""
    return device.readme(fields, adapters)


def _model(
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    name: str,
    deployment: Deployment,
    placed: Layout,
    digest: str,
) -> bytes:
    release = layout.release_of(plan)
    adapted = [None, *(adapter.function_of(each.adapter) for each in deployment.adapters)]
    if config.reward:
        functions = {"main": reward_function(config, placed, deployment, release)}
    else:
        functions = {
            each or "main": decoder_function(config, placed, deployment, release, each)
            for each in adapted
        }
    told = device.properties(name, config, tokenizer, deployment.context, digest)
    return package.model_bytes(functions, release, told)


def _placed(config: DecoderConfig, plan: Plan, deployment: Deployment) -> Layout:
    factors = [factor.stored for factor in _factors(config, deployment)]
    return layout.layout(config, plan, deployment, factors)


def _factors(config: DecoderConfig, deployment: Deployment) -> Iterator[adapter.Factor]:
    for separate in deployment.adapters:
        yield from adapter.factors(separate, config)
