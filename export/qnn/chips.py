"""The Hexagon processors that a context binary can be made for."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import Unsupported
from ..container import Deployment


class Chip(NamedTuple):
    """A processor: the version of its Hexagon, and how QNN calls the chip that has it."""

    hexagon: int
    soc: str
    soc_model: int


# v73 is the oldest that has int16 caches: older ones refuse them, or compute something else.
CHIPS = {
    chip.hexagon: chip
    for chip in (
        Chip(73, "SM8550", 43),
        Chip(75, "SM8650", 57),
        Chip(79, "SM8750", 69),
        Chip(81, "SM8850", 87),
    )
}


def chip_of(deployment: Deployment) -> Chip:
    """The chip that a target names.

    Raises:
        Unsupported: it names none, or one that QNN would silently replace by another.
    """
    if deployment.hexagon in CHIPS:
        return CHIPS[deployment.hexagon]
    named = "no" if deployment.hexagon is None else f"v{deployment.hexagon} as its"
    raise Unsupported(
        f"the target names {named} Hexagon processor",
        f"a context binary is for one of {', '.join(f'v{number}' for number in CHIPS)}",
        "take --target android-qnn, or set `hexagon = 73` in your own target",
    )
