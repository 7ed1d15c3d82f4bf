"""bitsandbytes' format of 4 bits with double quantization: 4.127 bits instead of 4.5."""

from __future__ import annotations

from functools import partial

from . import bitsandbytes
from .bitsandbytes import CURE as CURE
from .bitsandbytes import GRIDS as GRIDS
from .bitsandbytes import HOLDS as HOLDS
from .bitsandbytes import files as files
from .bitsandbytes import nested_meaning as meaning
from .bitsandbytes import refuse as refuse

__all__ = ["CURE", "GRIDS", "HOLDS", "files", "meaning", "refuse", "settings", "tensors"]

settings = partial(bitsandbytes.settings, double=True)
tensors = partial(bitsandbytes.tensors, double=True)
