"""Numba's compiler, set as every hot loop here needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call, without the GIL; keep the result on disk if there is a place.

    Never with fastmath: sums keep their order and no product is fused into a sum, so every CPU
    computes the same bytes. Division by zero follows IEEE 754.
    """
    jit: Any = numba.njit
    try:
        dispatcher = jit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # numba found no folder for its cache that it may write
        dispatcher = jit(function, nogil=True, error_model="numpy")
    return cast(Function, dispatcher)
