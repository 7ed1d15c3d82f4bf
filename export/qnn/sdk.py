"""Qualcomm's compiler and emulator for x86, from the wheel onnxruntime-qnn; of one tested version.

Its libraries are Qualcomm's and never go into a bundle.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ...errors import DependencyMissing

DISTRIBUTION, VERSION = "onnxruntime-qnn", "2.7.0"
PROVIDER = "QNNExecutionProvider"


def require() -> None:
    """Raise DependencyMissing if the wheel is not there, or is another than the tested one."""
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError:
        found = "not installed"
    if found != VERSION:
        raise DependencyMissing(
            f"container qnn needs {DISTRIBUTION} {VERSION}",
            f"it is {found}; releases differ in what they compile, and one was tested",
            f"pip install {DISTRIBUTION}=={VERSION}",
        )
