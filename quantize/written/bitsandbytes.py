"""bitsandbytes' format of 4 bits (see given/bitsandbytes.py for what is where).

The scales are the model's own, in float32. Double quantization rounds them after codes were chosen,
as bitsandbytes does it: places in a map of 256 numbers (arXiv:2110.02861), times the largest of
each 256 scales, around their mean. What is written then is another model than the one given, and
its weights are those of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..grid import Float32, Grid
from ..plan import Choice, Plan
from ..store import QuantizedCheckpoint
from ..tensor import QuantizedTensor

GRIDS = ("nf4-g64", "fp4-g64")
HOLDS = "bitsandbytes has codes of nf4-g64 or fp4-g64 in Linears alone"
CURE = "choose --preset nf4, or write slimport's own format"
_NESTED = 256  # scales that share one of their own
Tensors = Mapping[str, tuple[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]]]


def refuse(plan: Plan) -> None:
    """Raise nothing: any of the grids goes beside any other."""


class Nested(NamedTuple):
    """Scales in double quantization: float32 of map[places] * largest of their block + offset."""

    places: npt.NDArray[np.uint8]
    largest: Float32
    offset: np.float32

    def scales(self) -> Float32:
        """float32 (scales,), in the order in which bitsandbytes computes."""
        repeated = np.repeat(self.largest, _NESTED)[: len(self.places)]
        found: Float32 = dynamic_map()[self.places] * repeated
        return found + self.offset


def dynamic_map() -> Float32:
    """float32 (256,), ascending: seven exponents of 10, the larger the more numbers; 0 and 1.

    bitsandbytes computes it in float32, whose last bit depends on the CPU; the file holds this one.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        means = (borders[:-1] + borders[1:]) / 2 * 10.0 ** (exponent - 6)
        found += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(found, np.float32))


def nested(scale: Float32) -> Nested:
    """The nearest places for scales (scales,); the mean is that of exact sums on any CPU."""
    offset = np.float32(math.fsum(scale.tolist()) / len(scale))
    centred = scale - offset
    blocks = np.pad(centred, (0, -len(scale) % _NESTED)).reshape(-1, _NESTED)
    largest = np.abs(blocks).max(1)
    levels = dynamic_map()
    shares = blocks / np.where(largest == 0, np.float32(1), largest)[:, None]
    places = np.searchsorted((levels[1:] + levels[:-1]) / 2, shares).astype(np.uint8)
    return Nested(places.reshape(-1)[: len(scale)], largest, offset)


def meaning(tensor: QuantizedTensor) -> QuantizedTensor:
    """What is written of a weight: the same."""
    return tensor


def nested_meaning(tensor: QuantizedTensor) -> QuantizedTensor:
    """What double quantization makes of a weight."""
    scale = nested(tensor.scale.reshape(-1)).scales().reshape(tensor.scale.shape)
    return QuantizedTensor(tensor.grid, tensor.codes, scale)


def settings(plan: Plan, dtype: str, double: bool = False) -> dict[str, Any]:
    """quantization_config of a model whose float tensors are of `dtype`."""
    left = [c.weight.name for c in plan.choices if c.grid is None and c.weight.is_linear]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": _kind(plan.quantized[0]),
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *(name.removesuffix(".weight") for name in left)],
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def files(plan: Plan) -> dict[str, dict[str, Any]]:
    """None beside config.json."""
    return {}


def tensors(model: QuantizedCheckpoint, choice: Choice, double: bool = False) -> Tensors:
    """{name: (dtype, shape, its values)} of one weight."""
    name, (rows, columns) = choice.weight.name, choice.weight.shape
    grid, scales = choice.grid, rows * columns // 64
    assert isinstance(grid, Grid) and grid.levels is not None, "refuse lets no others pass"

    def load() -> QuantizedTensor:
        tensor = model.load(name)
        assert isinstance(tensor, QuantizedTensor), "its grid says so"
        return tensor

    def codes() -> npt.NDArray[np.uint8]:
        raised = (load().codes - np.int8(grid.low)).view(np.uint8).reshape(-1, 2)
        return (raised[:, :1] << np.uint8(4)) | raised[:, 1:]

    state: dict[str, Any] = {
        "quant_type": _kind(choice),
        "blocksize": 64,
        "dtype": "float32",
        "shape": [rows, columns],
    }
    found: dict[str, Any] = {
        name: ("|u1", (rows * columns // 2, 1), codes),
        f"{name}.quant_map": ("<f4", (16,), lambda: np.array(grid.levels, "<f4")),
    }
    if double:
        inner = nested(load().scale.reshape(-1))
        state |= {"nested_blocksize": _NESTED, "nested_dtype": "float32"}
        state["nested_offset"] = float(inner.offset)
        found |= {
            f"{name}.absmax": ("|u1", (scales,), lambda: inner.places),
            f"{name}.nested_absmax": ("<f4", inner.largest.shape, lambda: inner.largest),
            f"{name}.nested_quant_map": ("<f4", (256,), dynamic_map),
        }
    else:
        absmax = lambda: np.ascontiguousarray(load().scale.reshape(-1), "<f4")  # noqa: E731
        found[f"{name}.absmax"] = ("<f4", (scales,), absmax)
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    kept = f"{name}.quant_state.bitsandbytes__{_kind(choice)}"
    return found | {kept: ("|u1", packed.shape, lambda: packed)}


def _kind(choice: Choice) -> str:
    assert choice.grid is not None, "asked of quantized weights"
    return choice.grid.name.partition("-")[0]
