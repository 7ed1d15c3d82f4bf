"""Checkpoints of GPTQ in auto-gptq's layout, as optimum and gptqmodel write them too.

For a weight of `out` rows and `in` columns: `qweight` int32 (in * bits / 32, out), low bits first
along the inputs; `qzeros` int32 (in / group, out * bits / 32); `scales` (in / group, out); `g_idx`
int32 (in,). A weight is (q - z) * scale. Format "gptq" stores z - 1, "gptq_v2" stores z; files are
mislabelled, so their values decide: weights lie around 0, so the mean code is the zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import BadInput, Unsupported
from ..grid import Float32, Grid, UInt8
from ..tensor import QuantizedTensor
from .entry import FULL_PRECISION, Entry, fields, grid_of, inconsistent, nine_bits, shape_of

MAKER = "GPTQ"
_SUFFIX = ".qweight"
_ADDED = {"gptq": 1, "gptq_v2": 0}  # to a stored zero point
_SURE = 0.3  # how far the mean code may lie from the zero points that a format says
_JUDGED = 1 << 22  # codes that a format is found out from


def entries(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """{source name: what is stored of it}.

    Raises:
        BadInput: tensors that do not fit each other, or whose format cannot be told.
        Unsupported: another layout, groups of scattered inputs, or a grid that nothing holds.
    """
    bits, label = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if label not in _ADDED or settings.get("pack_dtype", "int32") != "int32":
        raise Unsupported(
            f"a GPTQ checkpoint of format {label}, packed into {settings.get('pack_dtype')}",
            f"slimport reads {' and '.join(_ADDED)}, packed into int32",
            "convert it with gptqmodel, or export the full-precision model",
        )
    if bits not in (4, 8):
        raise Unsupported(
            f"a GPTQ checkpoint of {bits} bits", "slimport reads 4 and 8 bits", FULL_PRECISION
        )
    stems = [name.removesuffix(_SUFFIX) for name in checkpoint.names() if name.endswith(_SUFFIX)]
    stored = {stem: _Stored(checkpoint, stem, bits) for stem in stems}
    added = _added(stored)
    return {f"{stem}.weight": each.entry(added) for stem, each in stored.items()}


class _Stored:
    """The tensors of one weight, with shapes that fit each other."""

    def __init__(self, checkpoint: Checkpoint, stem: str, bits: int) -> None:
        self.checkpoint, self.stem, self.bits = checkpoint, stem, bits
        words, rows = shape_of(checkpoint, f"{stem}.qweight")
        groups, width = shape_of(checkpoint, f"{stem}.scales")
        columns = words * 32 // bits
        packed = shape_of(checkpoint, f"{stem}.qzeros")
        if not groups or columns % groups or width != rows or packed != (groups, rows * bits // 32):
            why = f"its scales are {(groups, width)}, its zero points {packed}"
            raise inconsistent(f"{stem}.qweight {(words, rows)}", why)
        self.shape, self.group = (rows, columns), columns // groups
        self._refuse_scattered()

    def _refuse_scattered(self) -> None:
        """Inputs of a group must lie side by side: no container stores a permutation."""
        name = f"{self.stem}.g_idx"
        if name not in self.checkpoint.tensors:
            return
        found = self.checkpoint.integers(name)
        if not np.array_equal(found, np.arange(self.shape[1]) // self.group):
            raise Unsupported(
                f"{name}: inputs of a group do not lie side by side",
                "act-order without static groups scattered them, and containers store no order",
                "quantize it again with static_groups = true or desc_act = false, or"
                f" {FULL_PRECISION}",
            )

    def codes(self) -> UInt8:
        """As stored, uint8 (rows, columns)."""
        words = self.checkpoint.integers(f"{self.stem}.qweight").view(np.uint32)
        return np.ascontiguousarray(fields(words, self.bits).swapaxes(0, 1)).reshape(self.shape)

    def zeros(self) -> UInt8:
        """As stored, uint8 (rows, groups)."""
        words = self.checkpoint.integers(f"{self.stem}.qzeros").view(np.uint32)
        return np.ascontiguousarray(fields(words, self.bits).reshape(len(words), -1).T)

    def scale(self) -> Float32:
        """float32 (rows, groups)"""
        return np.ascontiguousarray(self.checkpoint.rows(f"{self.stem}.scales").T)

    def excess(self, stored: UInt8) -> float:
        """How much the mean code lies above the mean zero point, given these: 1 or 0."""
        return float(self.codes().mean() - stored.mean())

    def entry(self, added: int) -> Entry:
        zero, middle = self.zeros().astype(np.int16) + added, 1 << (self.bits - 1)
        symmetric = bool((zero == middle).all())
        if int(zero.max()) >= 1 << self.bits:
            raise Unsupported(
                f"{self.stem}: a zero point of {int(zero.max())} lies beyond its codes",
                "older versions of auto-gptq wrapped it to 0 and newer ones did not, so that what"
                " it means cannot be told",
                FULL_PRECISION,
            )
        lowest = -middle
        if symmetric and self.bits == 8:
            lowest = int(self.codes().min()) - middle
        grid = grid_of(
            self.stem, self.bits, self.group, self.shape[1], self.scale(), symmetric, lowest
        )
        parts = [f"{self.stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
        known = tuple(part for part in parts if part in self.checkpoint.tensors)
        return Entry(self.shape, known, grid, partial(self._load, grid, added))

    def _load(self, grid: Grid, added: int) -> QuantizedTensor:
        rows, columns = self.shape
        zero = (self.zeros() + np.uint8(added))[:, :, None]
        groups = self.codes().reshape(rows, zero.shape[1], -1) - zero  # wraps round
        return QuantizedTensor(grid, groups.view(np.int8).reshape(rows, columns), self.scale())


def _added(stored: Mapping[str, _Stored]) -> int:
    """What is to be added to stored zero points, as the values of the first weights show it."""
    found: set[int] = set()
    judged = 0
    for stem, each in stored.items():
        zeros, middle = each.zeros(), 1 << (each.bits - 1)
        alike = bool((zeros == zeros.flat[0]).all())
        if alike and int(zeros.flat[0]) in (middle - 1, middle):  # symmetric
            found.add(middle - int(zeros.flat[0]))
            continue
        if each.bits == 8:
            raise nine_bits(stem)
        if judged > _JUDGED:
            continue
        judged += each.shape[0] * each.shape[1]
        excess = each.excess(zeros)
        if abs(excess - round(excess)) > _SURE or round(excess) not in (0, 1):
            raise _untold(stem, f"codes lie {excess:.2f} above the zero points on average")
        found.add(round(excess))
    if len(found) > 1:
        raise _untold(next(iter(stored)), "weights of one model show different ones")
    return found.pop() if found else 0


def _untold(stem: str, why: str) -> BadInput:
    return BadInput(
        f"{stem}: whether its zero points are stored less 1 cannot be told",
        f'{why}; format "gptq" stores z - 1, "gptq_v2" stores z, and files are mislabelled',
        "quantize it again with gptqmodel, or export the full-precision model",
    )
