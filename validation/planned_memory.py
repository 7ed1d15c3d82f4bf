"""What a runtime will hold in memory, from shapes alone: for a plan that is not made yet.

Weights as the runtimes' own modules count them in a finished file; activations by a formula for
each runtime. What a bundle's report says of its finished files stands above it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..architectures import DecoderConfig
from ..export.gguf.layout import ggml_type
from ..quantize.grid import Grid
from ..quantize.plan import Choice, Plan
from .runtime import Memory
from .runtimes.llamacpp_memory import is_repacked, kv_cache_bytes

_FLOAT, _HALF = 4, 2
_CHUNK = 128  # tokens of a prompt that Core ML's functions are given at a time
_UBATCH = 512  # and llama.cpp's
_ORT_CHUNK = 128  # onnxruntime-genai's, as the bundle's settings say


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """Bytes of a loaded model, weight by weight.

    Attributes:
        mapped, repacked: {source name: bytes}, as Memory's.
        kv_cache, compute: as Memory's; they do not depend on grids.
    """

    mapped: Mapping[str, int]
    repacked: Mapping[str, int]
    kv_cache: int
    compute: int

    @property
    def weights(self) -> dict[str, int]:
        return {name: size + self.repacked.get(name, 0) for name, size in self.mapped.items()}

    @property
    def memory(self) -> Memory:
        weights = sum(self.mapped.values()), sum(self.repacked.values())
        return Memory(*weights, self.kv_cache, self.compute)


Sizes = Mapping[str, int]
_Planned = Callable[[DecoderConfig, Plan, Sizes, int, str, Collection[str]], PlannedMemory]


def planned_memory(
    container: str,
    config: DecoderConfig,
    plan: Plan,
    sizes: Sizes,
    context: int,
    kv_cache: str,
    isa: Collection[str],
) -> PlannedMemory | None:
    """Bytes at a context of `context` tokens; None: not known for this container.

    Args:
        sizes: {source name: bytes in the file}, as Container.tensor_bytes.
        isa: features of the device's CPU.
    """
    found = _BY_CONTAINER.get(container)
    return None if found is None else found(config, plan, sizes, context, kv_cache, isa)


def _llamacpp(
    config: DecoderConfig,
    plan: Plan,
    sizes: Sizes,
    context: int,
    kv_cache: str,
    isa: Collection[str],
) -> PlannedMemory:
    """Activations: within 7% of what llama.cpp states for ten shapes of Llama models."""
    repacked = {}
    for choice in plan.quantized:
        kind = None if choice.grid is None else ggml_type(choice.grid)
        shape = choice.weight.shape
        looked_up = choice.weight.is_table and choice.weight.name.endswith("embed_tokens.weight")
        if kind is not None and is_repacked(kind, shape, isa) and (config.tied or not looked_up):
            repacked[choice.weight.name] = sizes[choice.weight.name]
    tokens = min(_UBATCH, context)
    widest = max(config.vocab_size, 3 * config.intermediate_size)
    width = widest + 2 * config.hidden_size + 1040
    compute = _HALF * tokens * context + _FLOAT * (tokens * width + config.vocab_size)
    return PlannedMemory(sizes, repacked, kv_cache_bytes(config, context, kv_cache), compute)


def _onnxruntime(
    config: DecoderConfig,
    plan: Plan,
    sizes: Sizes,
    context: int,
    kv_cache: str,
    isa: Collection[str],
) -> PlannedMemory:
    """Codes are packed anew with a scale and a sum for each block; as onnxruntime_memory counts."""
    mapped: dict[str, int] = {}
    repacked: dict[str, int] = {}
    for choice in plan.choices:
        name = choice.weight.name
        if not choice.weight.is_matrix:
            continue
        embedding = name.endswith("embed_tokens.weight")
        mapped[name] = _codes(choice) if embedding else 0
        if not embedding or config.tied:
            repacked[name] = _codes(choice) + 3 * _FLOAT * _scales(choice)
    tokens = min(_ORT_CHUNK, context)
    heads, rows = config.heads, config.heads + 2 * config.kv_heads
    stages = (
        (rows + heads) * config.head_dim + heads * context,
        3 * config.intermediate_size,
        (2 if context > tokens else 1) * config.vocab_size,
    )
    compute = tokens * (2 * config.hidden_size + max(stages)) * _FLOAT
    width = 2 * config.layers * config.kv_heads * config.head_dim
    item = _HALF if kv_cache == "f16" else _FLOAT
    return PlannedMemory(mapped, repacked, width * context * item, compute)


def _coreml(
    config: DecoderConfig,
    plan: Plan,
    sizes: Sizes,
    context: int,
    kv_cache: str,
    isa: Collection[str],
) -> PlannedMemory:
    """As coreml_memory counts, without the program itself."""
    width = config.vocab_size + 4 * config.intermediate_size + 2 * config.heads * context
    keys = 2 * config.layers * config.kv_heads * config.head_dim * context * _HALF
    return PlannedMemory(sizes, sizes, keys, _HALF * min(_CHUNK, context) * width)


_BY_CONTAINER: Mapping[str, _Planned] = {
    "gguf": _llamacpp,
    "onnx": _onnxruntime,
    "ort": _onnxruntime,
    "coreml": _coreml,
}


KNOWN = tuple(_BY_CONTAINER)


def _codes(choice: Choice) -> int:
    rows, columns = choice.weight.shape
    grid = choice.grid
    return rows * columns * _FLOAT if grid is None else -(-rows * columns * _bits(choice) // 8)


def _bits(choice: Choice) -> int:
    assert isinstance(choice.grid, Grid), "ONNX holds no others"
    return choice.grid.bits


def _scales(choice: Choice) -> int:
    """Stored ones: a scale of a whole row is repeated for blocks of 256 weights."""
    if choice.grid is None:
        return 0
    assert isinstance(choice.grid, Grid), "ONNX holds no others"
    rows, columns = choice.weight.shape
    return rows * -(-columns // (choice.grid.group or 256))
