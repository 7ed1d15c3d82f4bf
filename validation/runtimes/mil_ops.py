"""The operations of ML Programs, in float32 on the CPU: {type: how it is computed}.

What each does, and what it does with an argument that is left out, is what coremltools' definitions
say (converters/mil/mil/ops/defs, iOS 15 to 18).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from . import mil_shapes
from .mil_operator import Constant, Operator

_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
_CASTS = ("fp16", "fp32", "bool", "uint16", *_INTEGERS)


def _cast(x: Tensor, dtype: str) -> Tensor:
    """Towards zero; a uint16 is held as int32."""
    if dtype in ("fp16", "fp32"):
        return x.float()
    if dtype == "bool":
        return x != 0
    return x.int() & 0xFFFF if dtype == "uint16" else x.to(_INTEGERS[dtype])


def _log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def _rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def _inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


def _clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def _linear(x: Tensor, weight: Constant, bias: Constant | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Constant | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Sizes of `pad` lie before and behind each axis; `same` puts an odd one behind."""
    rank = x.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pairs = [(0, 0)] * rank
    if pad_type == "custom":
        sizes = pad or [0] * (2 * rank)
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    elif pad_type != "valid":
        for axis in range(rank):
            size, reach = x.shape[2 + axis], (weight.shape[2 + axis] - 1) * dilations[axis] + 1
            more = max(0, (math.ceil(size / strides[axis]) - 1) * strides[axis] + reach - size)
            less = more // 2
            pairs[axis] = (less, more - less) if pad_type == "same" else (more - less, less)
    if any(map(any, pairs)):
        x = functional.pad(x, [size for pair in reversed(pairs) for size in pair])
    compute: Callable[..., Tensor] = _CONVOLUTIONS[rank]
    return compute(x, weight, bias, strides, 0, dilations, groups)


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def _layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Constant | None = None,
    beta: Constant | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    over = list(range(x.dim())) if axes is None else sorted(axis % x.dim() for axis in axes)
    sizes = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    found = (x - mean) * torch.rsqrt(variance + epsilon)
    found = found if gamma is None else found * gamma.reshape(sizes)
    return found if beta is None else found + beta.reshape(sizes)


def _l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    if x.dim() < 3:
        raise ValueError(f"it is of rank {x.dim()}")
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _reduced(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation over some axes, or all; integers stay what they are."""

    def reduce(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        over = tuple(range(x.dim())) if axes is None else tuple(axes)
        return compute(x, over, keep_dims).to(x.dtype)

    return reduce


def _argument(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def find(
        x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
    ) -> Tensor:
        return compute(x, axis, keep_dims).int()

    return find


def _topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """Of equal numbers the first comes first."""
    values, places = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values = values.narrow(axis, 0, k)
    return (values, places.narrow(axis, 0, k).int()) if return_indices else values


def _cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    turned = x.flip(axis) if reverse else x
    found = turned.cumsum(axis, dtype=x.dtype)
    found = found - turned if exclusive else found
    return found.flip(axis) if reverse else found


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Its steps one by one: torch's own hides what becomes of a row that sees nothing."""
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(f"queries of {tuple(query.shape)}, keys of {tuple(key.shape)}")
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    """Of integers only what leaves no rest: how a rest is rounded is documented nowhere."""
    if x.is_floating_point():
        return x / y
    found = torch.div(x, y, rounding_mode="floor")
    if not torch.equal(found * y, x.expand_as(found)):
        raise ValueError("integers are divided, and leave a rest")
    return found


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": functional.silu,
    "sin": torch.sin,
    "softplus": functional.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": _real_div,
    "sub": torch.sub,
}
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
}


def _of_one(compute: Callable[[Tensor], Tensor]) -> Operator:
    return Operator(lambda x: compute(x))


def _of_two(compute: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(lambda x, y: compute(x, y))


def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


OPERATORS: dict[str, Operator] = {
    **{name: _of_one(compute) for name, compute in _UNARY.items()},
    **{name: _of_two(compute) for name, compute in _BINARY.items()},
    **{name: Operator(_reduced(compute)) for name, compute in _REDUCTIONS.items()},
    **mil_shapes.OPERATORS,
    "cast": Operator(_cast, {"dtype": _CASTS}, one=False),
    "clip": Operator(_clip),
    "conv": Operator(_conv, {"pad_type": ("valid", "custom", "same", "same_lower")}),
    "cumsum": Operator(_cumsum),
    "gelu": Operator(_gelu, {"mode": ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")}),
    "inverse": Operator(_inverse),
    "l2_norm": Operator(_l2_norm),
    "layer_norm": Operator(_layer_norm),
    "linear": Operator(_linear),
    "log": Operator(_log),
    "logical_not": Operator(lambda x: torch.logical_not(x)),
    "matmul": Operator(_matmul),
    "reduce_argmax": Operator(_argument(torch.argmax), {"output_dtype": ("int32", "uint16")}),
    "reduce_argmin": Operator(_argument(torch.argmin), {"output_dtype": ("int32", "uint16")}),
    "rsqrt": Operator(_rsqrt),
    "scaled_dot_product_attention": Operator(_scaled_dot_product_attention),
    "select": Operator(_select, moves=True),
    "softmax": Operator(_softmax),
    "topk": Operator(_topk, {"output_indices_dtype": ("int32", "uint16")}, moves=True),
}
