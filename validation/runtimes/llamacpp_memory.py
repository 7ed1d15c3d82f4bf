"""What llama.cpp will hold in memory on a CPU that is not here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from ...architectures import DecoderConfig
from ...export.gguf.reader import Stored, open_gguf
from ...quantize import ggml
from ...quantize.ggml import Type
from ..runtime import Memory

# ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type: which types a CPU with a feature copies
# into an interleaved layout, if the rows divide by the number here.
_REPACKED: dict[str, dict[Type, int]] = {
    "arm64": {Type.IQ4_NL: 4},
    "dotprod": {
        **dict.fromkeys((Type.Q4_0, Type.Q8_0, Type.MXFP4), 4),
        **dict.fromkeys((Type.Q4_K, Type.Q5_K, Type.Q6_K), 8),
    },
    "i8mm": {
        **dict.fromkeys((Type.Q4_0, Type.Q8_0), 4),
        **dict.fromkeys((Type.Q4_K, Type.Q5_K, Type.Q6_K), 8),
    },
    "avx2": dict.fromkeys((Type.Q4_0, Type.Q4_K, Type.IQ4_NL, Type.MXFP4), 8),
    "avx512": {Type.Q2_K: 8},
}
_FEATURES = {  # as ggml finds them on the CPU that runs it
    "arm64": "ggml_cpu_has_neon",
    "dotprod": "ggml_cpu_has_dotprod",
    "i8mm": "ggml_cpu_has_matmul_int8",
    "avx2": "ggml_cpu_has_avx2",
    "avx512": "ggml_cpu_has_avx512",
}
_TABLE, _HEAD = "token_embd.weight", "output.weight"
_CONTEXT_STEP = 256  # llama.cpp rounds the context up to whole steps


def memory_on(file: Path, isa: Collection[str], measured: Memory) -> Memory:
    """`measured` with `mapped` and `repacked` as predicted for a CPU with the features `isa`."""
    mapped, repacked = weight_bytes(file, isa)
    return replace(measured, mapped=mapped, repacked=repacked)


def weight_bytes(file: Path, isa: Collection[str]) -> tuple[int, int]:
    """Bytes of weights that stay mapped, and bytes that are copied for the CPU's fast kernels.

    Every matrix that is multiplied is copied, if its type is one that a CPU with these features
    repacks. An embedding is only looked up, but a tied one is multiplied as the head, too: its copy
    is the head's. What stays mapped reaches from the first to the last tensor that is used in
    place, and covers the originals of copies between them.

    Args:
        isa: features such as {"arm64", "dotprod", "i8mm"}; unknown ones change nothing.
    """
    tensors = list(open_gguf(file).tensors.values())
    tied = all(tensor.name != _HEAD for tensor in tensors)
    copied = [_copied(tensor, isa) and (tied or tensor.name != _TABLE) for tensor in tensors]
    in_place = [
        index for index, tensor in enumerate(tensors) if tensor.name == _TABLE or not copied[index]
    ]
    mapped = sum(tensor.rows.nbytes for tensor in tensors[min(in_place) : max(in_place) + 1])
    repacked = sum(tensor.rows.nbytes for tensor in compress(tensors, copied))
    return mapped, repacked


def _copied(tensor: Stored, isa: Collection[str]) -> bool:
    return is_repacked(Type(tensor.type), tensor.shape, isa)


def is_repacked(kind: Type, shape: Sequence[int], isa: Collection[str]) -> bool:
    """Whether a tensor (rows, columns) of a type is copied for a CPU with the features `isa`."""
    steps = [_REPACKED.get(feature, {}).get(kind) for feature in isa]
    return len(shape) == 2 and any(step and shape[0] % step == 0 for step in steps)


def kv_cache_bytes(config: DecoderConfig, context: int, kv_cache: str) -> int:
    """Bytes of keys and values at a context of `context` tokens, in a ggml type."""
    tokens = -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
    row = ggml.row_bytes(Type[kv_cache.upper()], config.kv_heads * config.head_dim)
    return 2 * config.layers * tokens * row


def isa_here() -> tuple[str, ...]:
    """The features of this machine's CPU, as ggml sees them."""
    lib = ggml.library()
    return tuple(feature for feature, symbol in _FEATURES.items() if getattr(lib, symbol)())
