"""Apple's compiler and Linux runtime for Core AI, from the extra `coreai`; of one tested release.

Apple's libraries never go into a bundle.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ...errors import DependencyMissing

CORE, TORCH = "coreai-core", "coreai-torch"
VERSIONS = {CORE: "1.0.0b3", TORCH: "0.4.3"}
INSTALL = "pip install " + " ".join(f"{name}=={wanted}" for name, wanted in VERSIONS.items())


def require() -> None:
    """Raise DependencyMissing if a package is not there, or is another than the tested one."""
    for name, wanted in VERSIONS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            raise DependencyMissing(
                f"container coreai needs {name} {wanted}",
                f"it is {found}; Core AI is a beta, and one release was tested",
                INSTALL,
            )
