"""Operations of ML Programs that move numbers: shapes, slices, what is gathered and joined.

What each does is what coremltools' definitions say (converters/mil/mil/ops/defs, iOS 15 to 18).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .mil_operator import Computed, Operator, Table, bounded
from .mil_weights import Weight


def _reshape(x: Tensor, shape: Computed) -> Tensor:
    """Zeros are the sizes of x, counted from its last axis."""
    ahead = len(shape) - x.dim()
    sizes = [
        size or (x.shape[axis - ahead] if axis >= ahead else 1) for axis, size in enumerate(shape)
    ]
    return x.reshape(sizes)


def _expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    if not all(-rank <= axis < rank for axis in axes):
        raise IndexError(f"axes {axes} of {rank}")
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _index(x: Tensor, begin: Any, end: Any, stride: Any, *masks: Any) -> tuple[Any, ...]:
    """What numpy would be given; a mask is of begin, of end, and of axes that are taken out."""
    rank = x.dim()
    stride = stride or [1] * rank
    from_first, to_last, one = ([False] * rank if mask is None else mask for mask in masks)
    lengths = {len(each) for each in (begin, end, stride, from_first, to_last, one)}
    if lengths != {rank}:
        raise IndexError(f"{rank} axes are sliced by lists of {sorted(lengths)} numbers")
    index: list[Any] = []
    for axis in range(rank):
        start = None if from_first[axis] else begin[axis]
        if one[axis]:
            index.append(start or 0)
        else:
            stop = None if to_last[axis] else end[axis]
            index.append(slice(start, stop, stride[axis]))
    return tuple(index)


def _slice_by_index(
    x: Tensor,
    begin: Computed,
    end: Computed,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    index = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if stride is None or min(stride) > 0:
        return x[index]
    for axis, each in enumerate(index):  # torch has no negative steps
        if isinstance(each, slice) and each.step < 0:
            places = torch.arange(x.shape[axis])[range(x.shape[axis])[each]]
            x = x.index_select(axis, places)
    kept = (slice(None) if isinstance(e, slice) and e.step < 0 else e for e in index)
    return x[tuple(kept)]


def slice_update_in_place(
    x: Tensor,
    update: Tensor,
    begin: Computed,
    end: Computed,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """x itself, a part of it overwritten."""
    index = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if stride is not None and min(stride) < 1:
        raise ValueError(f"it writes in steps of {stride}")
    part = x[index]
    if part.shape != update.shape or part.dtype != update.dtype:
        raise ValueError(f"{tuple(update.shape)} is written to {tuple(part.shape)}")
    part.copy_(update)
    return x


def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: Computed,
    end: Computed,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    masks = begin_mask, end_mask, squeeze_mask
    return slice_update_in_place(x.clone(), update, begin, end, stride, *masks)


def _slice_by_size(x: Tensor, begin: Computed, size: Computed) -> Tensor:
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start += x.shape[axis] if start < 0 else 0
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def _gather(
    x: Table,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """From iOS 17 on, negative indices are out of bounds, and what they give is not defined."""
    places, rank = indices.reshape(-1).int(), len(x.shape)
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} of {tuple(x.shape)}")
    axis %= rank
    if isinstance(x, Weight) and axis == 0:
        found = x.rows(places)
    else:
        x = x.dense() if isinstance(x, Weight) else x
        found = x.index_select(axis, places)
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    sizes = list(x.shape)
    sizes[axis] = indices.shape[axis]
    if sizes != list(indices.shape):
        raise ValueError(f"indices {tuple(indices.shape)} of {tuple(x.shape)}")
    return x.gather(axis, indices.long())


def _concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Scalars become a list."""
    return torch.cat([each.reshape(-1) if not each.dim() else each for each in values], axis)


def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    sizes = split_sizes
    if sizes is None:
        if not num_splits or x.shape[axis] % num_splits:
            raise ValueError(f"{num_splits} parts of {x.shape[axis]}")
        sizes = [x.shape[axis] // num_splits] * num_splits
    return torch.split(x, sizes, axis)


def _tile(x: Tensor, reps: Computed) -> Tensor:
    bounded([size * times for size, times in zip(x.shape, reps, strict=True)])
    return x.repeat(reps)


def _pad(x: Tensor, pad: Computed, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Sizes before and behind each of the last axes."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if any(size < 0 for size in pad):
        raise ValueError(f"it is padded by {pad}")
    sizes = [sum(pair) for pair in pairs]
    ahead = [0] * (x.dim() - len(sizes))
    bounded([size + more for size, more in zip(x.shape, ahead + sizes, strict=True)])
    behind_first = list(itertools.chain.from_iterable(reversed(pairs)))
    return functional.pad(x, behind_first, value=constant_val)


def _range_1d(end: Computed, start: Computed, step: Computed) -> Tensor:
    bounded([max(0, math.ceil((end - start) / step))])
    dtype = torch.float32 if isinstance(end, float) else torch.int32
    return torch.arange(start, end, step, dtype=dtype)


def _fill(shape: Computed, value: float | int | bool = 0.0) -> Tensor:
    return torch.full(bounded(shape), value, dtype=_dtype_of(value))


def _fill_like(ref_tensor: Tensor, value: float | int | bool = 0.0) -> Tensor:
    return torch.full(ref_tensor.shape, value, dtype=_dtype_of(value))


def _one_hot(
    indices: Tensor,
    one_hot_vector_size: Computed,
    axis: int = -1,
    on_value: float | int | bool = 1,
    off_value: float | int | bool = 0,
) -> Tensor:
    bounded([*indices.shape, one_hot_vector_size])
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    dtype = _dtype_of(on_value)
    found = torch.where(hot, torch.tensor(on_value, dtype=dtype), torch.tensor(off_value))
    return found.to(dtype).movedim(-1, axis)


def _band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """A matrix below its diagonal `lower` and above `upper` becomes zeros."""
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    seen = (lower < 0 or rows - columns <= lower) & (upper < 0 or columns - rows <= upper)
    return torch.where(torch.as_tensor(seen), x, torch.zeros((), dtype=x.dtype))


def _dtype_of(value: float | int | bool) -> torch.dtype:
    kinds = {bool: torch.bool, int: torch.int32, float: torch.float32}
    return kinds[type(value)]


OPERATORS = {
    "reshape": Operator(_reshape, shares=True),
    "expand_dims": Operator(_expand_dims, shares=True),
    "squeeze": Operator(_squeeze, shares=True),
    "slice_by_index": Operator(_slice_by_index, shares=True),
    "slice_by_size": Operator(_slice_by_size, shares=True),
    "split": Operator(_split, shares=True),
    "identity": Operator(lambda x: x, shares=True),
    "slice_update": Operator(_slice_update, moves=True),
    "gather": Operator(_gather, {"batch_dims": (0,)}, moves=True),
    "gather_along_axis": Operator(_gather_along_axis, moves=True),
    "concat": Operator(_concat, {"interleave": (False,)}, moves=True),
    "tile": Operator(_tile, moves=True),
    "pad": Operator(_pad, {"mode": ("constant",)}, moves=True),
    "range_1d": Operator(_range_1d),
    "fill": Operator(_fill),
    "fill_like": Operator(_fill_like, one=False),
    "one_hot": Operator(_one_hot),
    "band_part": Operator(_band_part, moves=True),
    "shape": Operator(lambda x: torch.tensor(x.shape, dtype=torch.int32)),
}


def _transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


def _stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


OPERATORS["transpose"] = Operator(_transpose, shares=True)
OPERATORS["stack"] = Operator(_stack, moves=True)
