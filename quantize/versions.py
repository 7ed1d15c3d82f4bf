"""What codes depend on beside weights, plan and text: the processor, the libraries, this code."""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("slimport", "torch", "numpy", "numba", "xllamacpp")
_CODE = ("quantize", "decoder", "architectures", "adapters", "checkpoint.py")


def processor() -> str:
    """Its name, such as "AMD EPYC 7B13"."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def made_with() -> dict[str, str]:
    """Equal on two runs whose codes are equal bytes if their inputs are."""
    return {
        "processor": processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "code": _code(),
    }


def _code() -> str:
    """sha256 over the modules that quantize: a checkout changes without its version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in _CODE:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
