"""GPTQ's format, in auto-gptq's layout (see given/gptq.py for what is where).

Zero points are stored less 1, format "gptq", where all are the middle of the codes, so that every
loader reads them; others need a 0 as well and are written as "gptq_v2".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import Unsupported
from ..floats import exact_half
from ..grid import LINEAR, Grid, Int8
from ..plan import Choice, Plan
from ..store import QuantizedCheckpoint
from ..tensor import QuantizedTensor

GRIDS = tuple(LINEAR)
HOLDS = "GPTQ's format has integer codes of 4 and 8 bits with scales of groups or rows"
CURE = "choose one such as --preset int4 for layers, or write slimport's own format"
_WORD = 32
Tensors = Mapping[str, tuple[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]]]


def refuse(plan: Plan) -> None:
    """Raise Unsupported if weights need different settings, or rows do not fill words."""
    kinds = {(g.bits, g.group, g.asymmetric) for g in map(_grid, plan.quantized)}
    if len(kinds) > 1:
        names = sorted({_grid(choice).name for choice in plan.quantized})
        raise Unsupported(
            f"a GPTQ checkpoint cannot hold {' and '.join(names)} together",
            "its config.json has one number of bits and one group for all weights",
            "give every layer the same grid, such as --preset int4",
        )
    for choice in plan.quantized:
        each = _WORD // _grid(choice).bits
        if any(size % each for size in choice.weight.shape):
            raise Unsupported(
                f"{choice.weight.name}: GPTQ's format cannot hold its shape {choice.weight.shape}",
                f"rows and columns are packed by {each} into words of 32 bits",
                f'leave it in float16: "{choice.weight.name}" = "float16"',
            )


def meaning(tensor: QuantizedTensor) -> QuantizedTensor:
    """What is written of a weight: the same."""
    return tensor


def settings(plan: Plan, dtype: str) -> dict[str, Any]:
    """quantization_config, the same for every dtype of float tensors."""
    grid = _grid(plan.quantized[0])
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": -1 if grid.group is None else grid.group,
        "desc_act": False,
        "sym": not grid.asymmetric,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": "gptq_v2" if grid.asymmetric else "gptq",
        "pack_dtype": "int32",
    }


def files(plan: Plan) -> dict[str, dict[str, Any]]:
    """What auto-gptq reads beside config.json."""
    return {"quantize_config.json": settings(plan, "")}


def tensors(model: QuantizedCheckpoint, choice: Choice) -> Tensors:
    """{name: (dtype, shape, its values)} of one weight."""
    grid, (rows, columns) = _grid(choice), choice.weight.shape
    stem, groups = choice.weight.name.removesuffix(".weight"), grid.groups(columns)
    each = _WORD // grid.bits

    def load() -> QuantizedTensor:
        tensor = model.load(choice.weight.name)
        assert isinstance(tensor, QuantizedTensor), "refuse lets no others pass"
        return tensor

    def codes() -> npt.NDArray[np.int32]:
        return _words(_counted(load())[0].T, grid.bits)

    def zero_points() -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(_words(_counted(load())[1], grid.bits).T)

    return {
        f"{stem}.qweight": ("<i4", (columns // each, rows), codes),
        f"{stem}.qzeros": ("<i4", (groups, rows // each), zero_points),
        f"{stem}.scales": ("<f2", (groups, rows), lambda: exact_half(load().scale.T)),
        f"{stem}.g_idx": (
            "<i4",
            (columns,),
            lambda: np.arange(columns, dtype=np.int32) // np.int32(columns // groups),
        ),
    }


def _counted(tensor: QuantizedTensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Codes from 0 on, and zero points as they are stored."""
    if tensor.grid.asymmetric:
        codes, zero_points = tensor.from_zero()
        return codes.view(np.uint8), zero_points
    middle = 1 << (tensor.grid.bits - 1)
    raised = (tensor.codes.astype(np.int16) + middle).astype(np.uint8)
    return raised, np.full(tensor.scale.shape, middle - 1, np.uint8)


def _words(numbers: npt.NDArray[np.uint8] | Int8, bits: int) -> npt.NDArray[np.int32]:
    """Words along the first axis, low bits first."""
    each = _WORD // bits
    found = np.zeros((len(numbers) // each, numbers.shape[1]), np.uint32)
    for place in range(each):
        found |= numbers[place::each].astype(np.uint32) << np.uint32(bits * place)
    return found.view(np.int32)


def _grid(choice: Choice) -> Grid:
    assert isinstance(choice.grid, Grid), "refuse lets no others pass"
    return choice.grid
