"""The peers: the same file with codes by ggml's own kernels, through our reading and writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimport.architectures import DecoderConfig
from slimport.checkpoint import Weights
from slimport.export.gguf.layout import tensor_infos
from slimport.export.gguf.metadata import model_metadata
from slimport.export.gguf.packing import pack
from slimport.export.gguf.vocabulary import vocabulary_metadata
from slimport.export.gguf.writer import TensorInfo, write_file
from slimport.quantize.ggml import Type, quantize_rows
from slimport.quantize.grid import INT4_G32, INT8_ROW, Float32
from slimport.quantize.methods import rtn
from slimport.quantize.plan import Plan
from slimport.tokenizer.tokenizer import Tokenizer

_BLOCK = 1 << 20  # weights in one block of rows, as in quantizer.py

Kernel = Callable[[TensorInfo, Float32], NDArray[Any]]


def ggml_kernel(info: TensorInfo, values: Float32) -> NDArray[Any]:
    """The bytes of some rows by ggml's own quantizer."""
    return quantize_rows(info.type, values)


def our_kernel(info: TensorInfo, values: Float32) -> NDArray[Any]:
    """The same by `rtn-absmax` and our packer."""
    grid = INT4_G32 if info.type == Type.Q4_0 else INT8_ROW
    return pack(rtn.solve(values, grid, search=False))


def write_streamed(
    weights: Weights,
    config: DecoderConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    kind: Type,
    kernel: Kernel,
    path: Path,
    threads: int,
) -> None:
    """Read, quantize, write and fsync; Linears become `kind`, tables Q8_0, vectors F32.

    Blocks of rows go through `threads` threads, as in our own export. What an export needs beside
    is left out: nothing is hashed, kept or read back, and q and k rows keep their order.
    """
    infos = _typed(config, plan, kind)
    with ThreadPoolExecutor(threads) as pool:
        data = (
            _blocks(weights, choice.weight.name, info, kernel, pool, threads)
            for choice, info in zip(plan.choices, infos, strict=True)
        )
        write_file(path, _metadata(config, plan, tokenizer), infos, data)


def _blocks(
    weights: Weights,
    name: str,
    info: TensorInfo,
    kernel: Kernel,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Iterator[NDArray[Any]]:
    """The blocks of rows of one tensor in order, solved a few ahead in threads."""

    def solve(start: int) -> NDArray[Any]:
        values = weights.rows(name, start, start + step)
        return values if info.type == Type.F32 else kernel(info, values)

    rows, *rest = info.shape
    step = max(1, _BLOCK // prod(rest))
    waiting: deque[Future[NDArray[Any]]] = deque()
    for start in range(0, rows, step):
        waiting.append(pool.submit(solve, start))
        if len(waiting) > threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _typed(config: DecoderConfig, plan: Plan, kind: Type) -> list[TensorInfo]:
    infos = tensor_infos(config, plan)
    return [
        replace(info, type=GGMLQuantizationType(kind)) if choice.weight.is_linear else info
        for choice, info in zip(plan.choices, infos, strict=True)
    ]


def _metadata(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = vocabulary_metadata(tokenizer, config.vocab_size)
    return model_metadata(config, "peer", plan, tensor_infos(config, plan)) | vocabulary
