"""The files of a model up to their tensors: one program, or several that share their weights.

Without adapters `model.pte` has everything. With separate ones all tensors lie in
`base_weights.ptd`, and each program takes them from there by their keys: `model.pte` the base, and
one for each adapter, which brings its factors along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..container import Base
from ..layout import Stored
from . import device, program
from .decoder import NO_UPDATES, Updates, decoder_method
from .layout import Placed

_DIGEST = 16  # hexadecimal digits of a tensor's digest in its key
_NOTHING = program.Data((), 0, (), {})


def key(tensor: str, digest: str) -> str:
    """XNNPACK may share what it packed between programs by key, so that a key says what it holds.

    Args:
        digest: sha256 hex of the weight that the tensor is a part of.
    """
    return f"{tensor}:{digest[:_DIGEST]}"


def whole(base: Base, placed: Placed) -> bytes:
    """A program that has all its tensors."""
    keys = every_key(base, placed.layout.tensors)
    data = program.Data(placed.layout.tensors, placed.layout.nbytes, placed.constants, keys)
    return _program(base, placed, keys, data, outside=False)


def sharing(
    base: Base, placed: Placed, updates: Updates = NO_UPDATES, own: program.Data = _NOTHING
) -> bytes:
    """A program whose weights lie in WEIGHTS.

    Args:
        updates: what an adapter adds to matrices.
        own: tensors of the program, the factors of the updates among them.
    """
    keys = {**every_key(base, placed.layout.tensors), **own.keys}
    return _program(base, placed, keys, own, outside=True, updates=updates)


def weights(base: Base, placed: Placed) -> bytes:
    """WEIGHTS up to its tensors, which are those of `placed`."""
    keys = every_key(base, placed.layout.tensors)
    data = program.Data(placed.layout.tensors, placed.layout.nbytes, placed.constants, keys)
    return program.data_head(data)


def _program(
    base: Base,
    placed: Placed,
    keys: Mapping[str, str],
    data: program.Data,
    *,
    outside: bool,
    updates: Updates = NO_UPDATES,
) -> bytes:
    config, context = base.config, base.deployment.context
    methods = [
        decoder_method(
            config, placed, context, keys, outside=outside, updates=updates, all_logits=every
        )
        for every in (False, True)
    ]
    return program.serialize(methods, device.metadata(config, base.tokenizer, context), data)


def keys_of(base: Base, tensors: Iterable[Stored]) -> dict[str, str]:
    """{tensor: key} of those that are a part of a weight."""
    return {
        tensor.name: key(tensor.name, base.digests[tensor.choices[0].weight.name])
        for tensor in tensors
        if tensor.choices
    }


def every_key(base: Base, tensors: Sequence[Stored]) -> dict[str, str]:
    """{tensor: key}; tables and numbers are what they are called."""
    return {tensor.name: tensor.name for tensor in tensors} | keys_of(base, tensors)
