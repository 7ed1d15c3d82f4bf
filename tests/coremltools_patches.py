"""What coremltools 9.0 cannot do with the releases of numpy and torch that are installed here.

Only tests convert with it: what slimport ships it writes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest


@contextmanager
def patched() -> Iterator[None]:
    """While it lasts, `_cast` takes lists of one number.

    It calls int(array) on an array of shape (1,), which numpy 2.4 refuses: "only 0-dimensional
    arrays can be converted to Python scalars".
    """
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast

    def cast(context: Any, node: Any, dtype: Any, dtype_name: str) -> None:
        (x,) = ops._get_inputs(context, node, expected=1)
        if not x.can_be_folded_to_const() or isinstance(x.val, dtype):
            original(context, node, dtype, dtype_name)
            return
        value = dtype(np.asarray(x.val).reshape(()).item())
        context.add(Builder.const(val=value, name=node.name), node.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_cast", cast)
        yield
