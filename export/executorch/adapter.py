"""A LoRA adapter as a program of its own, which shares the weights of its base.

XNNPACK's graphs name what they multiply by, so another adapter is another program: small, with
the factors inside of it. The runtime takes everything else from the base's weights, by keys that
have their digests in them, so that it refuses the weights of another base by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ...adapters.adapter import Adapter
from ...architectures import weights
from ...quantize.grid import Float32
from ..container import (
    ANY_DIGEST,
    Base,
    foreign_adapter,
    not_the_adapter,
    refuse_all_but_layers,
)
from ..file import write_aligned
from ..layout import ALIGNMENT, Layout, Stored
from . import files, layout, program, reader
from .decoder import Updates

SUFFIX = ".pte"
Factor = tuple[Stored, Float32]


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported if the adapter is more than an addition to matrices of decoder layers."""
    refuse_all_but_layers(adapter, "ExecuTorch")


def predict_adapter(adapter: Adapter, base: Base) -> dict[str, int]:
    """{file name: bytes} of what `write_adapter` writes, to the byte."""
    factors = [stored for stored, _ in _factors(adapter, base, 1.0)]
    head, data = _head(adapter, base, factors, dict.fromkeys(factors, ANY_DIGEST))
    return {f"{adapter.name}{SUFFIX}": len(head) + data.nbytes}


def write_adapter(adapter: Adapter, base: Base, folder: Path, scale: float = 1.0) -> Path:
    """Write and fsync `NAME.pte`: a program as that of the base, with float32 factors of its own.

    All scales are in b, the user's `scale` among them.

    Raises:
        Unsupported: the adapter is more than an addition to matrices of decoder layers.
    """
    refuse_adapter(adapter)
    factors = dict(_factors(adapter, base, scale))
    digests = {each: hashlib.sha256(factor.data).hexdigest() for each, factor in factors.items()}
    head, data = _head(adapter, base, factors, digests)
    path = folder / f"{adapter.name}{SUFFIX}"
    content = {stored.name: factor for stored, factor in factors.items()}
    mark = np.frombuffer(base.weights_digest.encode(), np.uint8)
    write_aligned(
        path,
        head,
        ((each.name, each.nbytes, [content.get(each.name, mark)]) for each in data.tensors),
        ALIGNMENT,
    )
    return path


def check_adapter(path: Path, adapter: Adapter, base: Base, scale: float = 1.0) -> None:
    """Read an adapter's program back; its base's weights must lie in the folder above.

    Raises:
        BadInput: a file is malformed, or the program computes with other weights than the base.
        ValidationFailed: a factor differs, or an update is missing or left over.
    """
    refuse_foreign_adapter(path, base.weights_digest)
    folder = path.parent.parent
    found, alone = (reader.open_file(folder, base.config, file) for file in (path, None))
    if (found.uses, found.lookup) != (alone.uses, alone.lookup):
        raise not_the_adapter(path, f"it computes with other weights than {layout.MODEL}")
    wanted = {stored.name: factor for stored, factor in _factors(adapter, base, scale)}
    if found.updates.keys() != wanted.keys():
        name = min(found.updates.keys() ^ wanted.keys())
        raise not_the_adapter(path, f"{name} is missing or left over")
    for name, factor in wanted.items():
        place = found.keys[found.updates[name]]
        if place.nbytes != factor.nbytes or not np.array_equal(
            found.array(place, "<f4", factor.shape), factor
        ):
            raise not_the_adapter(path, f"{name} has other numbers")
    for name, stamp in found.stamps.items():
        if not base.digests.get(name, "").startswith(stamp):
            raise not_the_adapter(path, f"it takes {name} from another base")


def refuse_foreign_adapter(path: Path, base: str) -> None:
    """Raise BadInput if an adapter's program is not for the base with this weights digest."""
    found = reader.read_mark(path)
    if found != base:
        raise foreign_adapter(path, f"it is for a base with the digest {found}, not {base}")


def _factors(adapter: Adapter, base: Base, scale: float) -> Iterator[Factor]:
    """a (rank, columns), b (rows, rank) of each update, in the order of the forward pass."""
    for weight in weights(base.config):
        delta = adapter.deltas.get(weight.name)
        if delta is None:
            continue
        stem = weight.name.removesuffix(".weight")
        b = delta.b * np.float32(scale * delta.scale)
        for half, factor in (("lora_a", delta.a), ("lora_b", b)):
            values = np.ascontiguousarray(factor, "<f4")
            yield Stored(f"{stem}.{half}", "<f4", values.shape, (), "values"), values


def _head(
    adapter: Adapter, base: Base, factors: Iterable[Stored], digests: dict[Stored, str]
) -> tuple[bytes, program.Data]:
    """The program up to its tensors, and these."""
    mark = Stored(reader.MARK, "|u1", (len(base.weights_digest),), (), "values")
    own = Layout((), (mark, *factors))
    keys = {stored.name: files.key(stored.name, digests[stored]) for stored in factors}
    data = program.Data(own.tensors, own.nbytes, (), {**keys, mark.name: mark.name})
    updates: Updates = {
        (weight.layer, weight.kind): (
            own.by_name[f"{stem}.lora_a"],
            own.by_name[f"{stem}.lora_b"],
        )
        for weight in weights(base.config)
        if weight.name in adapter.deltas
        for stem in [weight.name.removesuffix(".weight")]
    }
    placed = layout.layout(base.config, base.plan, base.deployment)
    return files.sharing(base, placed, updates, data), data
