"""A finished file against the quantized checkpoint it was made from, weight by weight.

Two witnesses, neither of which shares code with the packer: reader.py for the codes, and ggml's own
`dequantize_row_*` for the values. Blocks of ggml's own types are compared byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...adapters.adapter import Adapter
from ...architectures import Weight, weights
from ...quantize.blocks import BlockTensor, Quantized
from ...quantize.compiled import compiled
from ...quantize.ggml import Type, dequantize_rows
from ...quantize.grid import Float32, Int8
from ...quantize.store import QuantizedCheckpoint
from ...quantize.tensor import QuantizedTensor
from ..container import Base, ReadBack, not_the_adapter
from ..readback import compare_weights, differs, float_error
from .reader import Stored, matched, open_gguf, source_rows, unpack

_CHUNK = 1 << 19  # weights dequantized at a time: the block stays in the CPU's cache


def check(model: QuantizedCheckpoint, path: Path, threads: int = 2) -> ReadBack:
    """Read `path` back and compare every code, scale and value with `model`.

    Raises:
        BadInput: the file is malformed.
        ValidationFailed: a weight differs; its name and the first differing element.
    """
    stored_by_name = {w.name: stored for w, stored in matched(open_gguf(path), model.decoder)}

    def read(weight: Weight) -> Quantized | float:
        stored, grid = stored_by_name[weight.name], model.plan[weight.name].grid
        found = unpack(path, stored, weight, model.decoder, grid.name if grid else None)
        if not isinstance(found, BlockTensor):
            _agree_with_ggml(weight.name, stored, found, source_rows(weight, model.decoder))
        if not isinstance(found, np.ndarray):
            return found
        expected: npt.NDArray[Any] = model.rows(weight.name)
        if weight.is_norm and model.decoder.family.norm_offset:
            expected = expected.astype(np.float64) + model.decoder.family.norm_offset
        dtype = "<f4" if stored.type == Type.F32 else "<f2"
        return float_error(weight.name, dtype, found, expected)

    return compare_weights(model, read, threads)


def _agree_with_ggml(
    name: str, stored: Stored, found: QuantizedTensor | Float32, rows: npt.NDArray[np.int64]
) -> None:
    """Compare with the values that ggml's kernel reads, some rows at a time."""
    columns = stored.shape[-1]
    step = max(1, _CHUNK // columns)
    for start in range(0, len(stored.rows), step):
        part = slice(start, start + step)
        by_ggml = dequantize_rows(stored.type, stored.rows[part], columns)
        if isinstance(found, QuantizedTensor):
            if _agrees(found.codes, found.scale, rows[part], by_ggml):
                continue
            ours = found.dequantize()[rows[part]]
        else:
            ours = (found[rows[part]] if found.ndim == 2 else found[rows]).reshape(by_ggml.shape)
        if not np.array_equal(ours, by_ggml):
            raise differs(name, f"from row {start} of the file, value", ours, by_ggml)


@compiled
def _agrees(codes: Int8, scale: Float32, rows: npt.NDArray[np.int64], values: Float32) -> bool:
    """Whether code times scale of some rows are `values`."""
    group = codes.shape[1] // scale.shape[1]
    for i in range(rows.size):
        for g in range(scale.shape[1]):
            factor = scale[rows[i], g]
            source = codes[rows[i], g * group : (g + 1) * group]
            target = values[i, g * group : (g + 1) * group]
            different = False
            for j in range(group):
                different |= np.float32(source[j]) * factor != target[j]
            if different:
                return False
    return True


def check_adapter(path: Path, adapter: Adapter, base: Base, scale: float) -> None:
    """Read an adapter's file back and compare both factors of every update.

    Args:
        base: what the file must be made for, by its digest.
        scale: the user's factor on the adapter.

    Raises:
        BadInput: the file is malformed.
        ValidationFailed: a factor differs, an update is missing or left over, or the base differs.
    """
    file, config = open_gguf(path), base.config
    wanted = {weight.gguf: weight for weight in weights(config) if weight.name in adapter.deltas}
    names = {f"{name}.{half}" for name in wanted for half in ("lora_a", "lora_b")}
    named = file.metadata.get("slimport.base_weights_digest")
    if set(file.tensors) != names or named != base.weights_digest:
        raise not_the_adapter(path, "its updates or its base are others")
    for name, weight in wanted.items():
        first, second = (
            file.tensors[f"{name}.{half}"].rows.view("<f4") for half in ("lora_a", "lora_b")
        )
        delta = adapter.deltas[weight.name]
        applied = second * np.float32(file.metadata["adapter.lora.alpha"] / delta.rank)
        if delta.embedding:
            plain, other, scaled = delta.b, delta.a.T, applied
        else:
            plain, other, scaled = delta.a, delta.b, np.empty_like(applied)
            scaled[source_rows(weight, config)] = applied
        wanted_scaled = other * np.float32(scale * delta.scale)
        if not (np.array_equal(first, plain) and np.allclose(scaled, wanted_scaled, 1e-5, 1e-9)):
            raise not_the_adapter(path, f"the update of {weight.name} has other factors")
