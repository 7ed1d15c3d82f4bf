"""Containers that hold an adapter only merged: the functions of a container that say so.

Their files go to a processor as a whole, with the weights inside.
"""

from __future__ import annotations

from pathlib import Path

from ..adapters.adapter import Adapter
from ..errors import Unsupported
from .container import Base, foreign_adapter


def refuse_adapter(adapter: Adapter) -> None:
    """Raise Unsupported: nothing is added to the weights at run time."""
    raise _no_adapters(adapter)


def predict_adapter(adapter: Adapter, base: Base) -> dict[str, int]:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(adapter)


def write_adapter(adapter: Adapter, base: Base, folder: Path, scale: float = 1.0) -> Path:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(adapter)


def check_adapter(path: Path, adapter: Adapter, base: Base, scale: float = 1.0) -> None:
    """Raise Unsupported, as `refuse_adapter`."""
    raise _no_adapters(adapter)


def refuse_foreign_adapter(path: Path, base: str) -> None:
    """Raise BadInput: a bundle of such a container has no adapters."""
    raise foreign_adapter(path, "the files of this container take no adapters")


def _no_adapters(adapter: Adapter) -> Unsupported:
    return Unsupported(
        f"the adapter {adapter.name} cannot stay separate",
        "the file that goes to the processor has its weights inside, and nothing is added to them"
        " at run time",
        "merge it: --adapter-mode merged, one bundle for each adapter",
    )
