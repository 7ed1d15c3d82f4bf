"""`model.pte` up to its tensors."""

from __future__ import annotations

from ..container import Base
from ..executorch import device, files, program
from .decoder import decoder_method
from .layout import Placed


def head(base: Base, placed: Placed) -> bytes:
    """The program, with the keys of all its tensors and of rows of them."""
    tensors = (*placed.layout.tensors, *placed.views)
    keys = files.every_key(base, tensors)
    data = program.Data(tensors, placed.layout.nbytes, placed.constants, keys)
    context = base.deployment.context
    method = decoder_method(base.config, placed, context, keys)
    return program.serialize([method], device.metadata(base.config, base.tokenizer, context), data)
