"""What ONNX Runtime holds in memory, from the graph and its settings.

ONNX Runtime states no sizes. What follows was compared with RssAnon (benchmarks/README.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...export.onnx.reader import File, Operand
from ..runtime import Memory

_FLOAT = 4
_LOOKUPS = ("Gather", "GatherBlockQuantized")
# The last one is not packed: its weight is made float32 for each product, and freed again.
_PRODUCTS = ("MatMulNBits", "FusedMatMul", "MatMulBnb4")
# Beside the codes, packed for the CPU, a block has its scale and the sum of its codes (mlas,
# SQNBitGemm). The scale is there once more, in the mapped file if it stands there as float32.
_BLOCK = 2 * _FLOAT


def memory(file: File, folder: Path, context: int, adapter: Path | None) -> Memory:
    """Bytes with a cache for `context` tokens, for prompts of any length that fits.

    A reward model keeps no cache, and reads a text of `context` tokens in one run.

    Args:
        file: the model in `folder`.
    """
    settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    products = {
        name: operand
        for name, node in file.nodes.items()
        if node.op_type in _PRODUCTS and (operand := file.operand(name))
    }
    mapped = [operand for operand in products.values() if operand.codebook]
    multiplied = {name: op for name, op in products.items() if not op.codebook}
    return Memory(
        mapped=sum(
            operand.codes.nbytes
            for name, node in file.nodes.items()
            if node.op_type in _LOOKUPS and (operand := file.operand(name))
        )
        + sum(_mapped_scale(operand) for operand in multiplied.values())
        + sum(operand.codes.nbytes + _mapped_scale(operand) for operand in mapped),
        repacked=sum(_packed_bytes(operand) for operand in multiplied.values()),
        kv_cache=_cache_bytes(file, settings, context),
        compute=_compute_bytes(settings, products, context)
        + max((_FLOAT * 2 * operand.codes.size for operand in mapped), default=0),
        adapter=adapter.stat().st_size if adapter else 0,
    )


def _packed_bytes(operand: Operand) -> int:
    if operand.scale is None:
        return operand.codes.size * _FLOAT
    copied = operand.scale.size * _FLOAT - _mapped_scale(operand)
    return operand.codes.nbytes + operand.scale.size * _BLOCK + copied


def _mapped_scale(operand: Operand) -> int:
    """Bytes of a scale that is read from the file; a float16 one is cast, which copies it."""
    scale = operand.scale
    return 0 if scale is None or scale.dtype.itemsize < _FLOAT else scale.nbytes


def _cache_bytes(file: File, settings: dict[str, Any], context: int) -> int:
    """Keys and values in the type of the graph's inputs; a reward model has none."""
    decoder = settings["model"]["decoder"]
    keys = decoder["inputs"].get("past_key_names")
    if keys is None:
        return 0
    width = (
        decoder["num_key_value_heads"] * decoder["head_size"] * file.input_dtype(keys % 0).itemsize
    )
    return int(2 * decoder["num_hidden_layers"] * width * context)


def _compute_bytes(settings: dict[str, Any], products: dict[str, Operand], context: int) -> int:
    """Activations of one run of prompt tokens: those of the stage that needs most.

    A stage has the residual stream twice, what it reads and what it makes; attention has its
    scores too. Logits of a run stay until those of the next are there.
    """
    decoder, reward = settings["model"]["decoder"], "search" not in settings
    tokens = context if reward else min(settings["search"]["chunk_size"], context)
    hidden = decoder["hidden_size"]
    vocabulary = 0 if reward else settings["model"]["vocab_size"]
    inner = max(len(op.codes) for name, op in products.items() if ".mlp." in name)
    heads = decoder["num_attention_heads"]
    rows = (heads + 2 * decoder["num_key_value_heads"]) * decoder["head_size"]
    stages = {
        "attention": rows + heads * decoder["head_size"] + heads * context,
        "feed_forward": 3 * inner,
        "head": 2 * vocabulary if context > tokens else vocabulary,
    }
    return int(tokens * (2 * hidden + max(stages.values())) * _FLOAT)
