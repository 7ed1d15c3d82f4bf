"""Backends of ExecuTorch that need a vendor's SDK, and where that is looked for.

Versions are those that ExecuTorch 1.4.1 is built and tested with: backends/qualcomm/scripts,
backends/mediatek/README.md, .ci/scripts/setup-samsung-linux-deps.sh and setup.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from ..errors import DependencyMissing, Unsupported


class Sdk(NamedTuple):
    """What a backend needs.

    Attributes:
        name: of the SDK, with its version.
        missing: what is not there, in a clause; None: it is there.
        install: what to do about it.
        instead: a container that reaches the same chips.
    """

    name: str
    missing: Callable[[], str | None]
    install: str
    instead: str


def _no_folder(variable: str) -> Callable[[], str | None]:
    """Whether an environment variable names a folder."""

    def missing() -> str | None:
        folder = os.environ.get(variable)
        if not folder:
            return f"{variable} is not set"
        return None if Path(folder).is_dir() else f"{variable} is {folder}, which is not a folder"

    return missing


def _no_distribution(**wanted: str) -> Callable[[], str | None]:
    """Whether Python distributions have these versions."""

    def missing() -> str | None:
        for name, number in wanted.items():
            try:
                found = version(name)
            except PackageNotFoundError:
                return f"{name} {number} is not installed"
            if found.partition("+")[0] != number:
                return f"{name} is {found}, not {number}"
        return None

    return missing


def _no_mac() -> str | None:
    return None if sys.platform == "darwin" else f"this is {sys.platform}, not macOS with Xcode"


SDKS: Mapping[str, Sdk] = {
    "executorch-qnn": Sdk(
        "Qualcomm AI Runtime SDK 2.37.0.250724",
        _no_folder("QNN_SDK_ROOT"),
        "download it from Qualcomm's software center, unpack it and set QNN_SDK_ROOT to its folder",
        "qnn",
    ),
    "executorch-mediatek": Sdk(
        "NeuroPilot Express SDK with mtk_neuron 8.2.23 and mtk_converter 8.13.0",
        _no_distribution(mtk_neuron="8.2.23", mtk_converter="8.13.0"),
        "download it from MediaTek's NeuroPilot portal and pip install both of its wheels (Python"
        " 3.10)",
        "gguf",
    ),
    "executorch-samsung": Sdk(
        "Exynos AI LiteCore 1.0 (ai-litecore-ubuntu2204-v1.0)",
        _no_folder("EXYNOS_AI_LITECORE_ROOT"),
        "download it from Samsung's SoC developer site, unpack it and set EXYNOS_AI_LITECORE_ROOT"
        " to its folder",
        "gguf",
    ),
    "executorch-coreml": Sdk(
        "macOS with Xcode and coremltools 9.0",
        _no_mac,
        "run slimport on a Mac, with pip install coremltools==9.0",
        "executorch",
    ),
}


def refuse(container: str) -> None:
    """Raise what stands against one of these containers; nothing for any other name.

    Raises:
        DependencyMissing: the SDK is not there.
        Unsupported: it is, and slimport does not write for it yet.
    """
    sdk = SDKS.get(container)
    if sdk is None:
        return
    instead = f"or take --container {sdk.instead}"
    why = sdk.missing()
    if why is not None:
        raise DependencyMissing(
            f"container {container} needs {sdk.name}", why, f"{sdk.install}; {instead}"
        )
    raise Unsupported(
        f"container {container} is not there yet",
        f"what it needs, {sdk.name}, seems to be there, and slimport writes nothing for it yet",
        instead.removeprefix("or "),
    )
