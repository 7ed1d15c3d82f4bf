"""The protobuf messages of Core ML's models, from coremltools without running coremltools.

Importing coremltools itself takes many seconds and hundreds of megabytes, and prints.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import DependencyMissing

_PACKAGE = "slimport_coremltools_proto"  # of our own, so that coremltools is not half imported
_BLOBS = "libmilstoragepython"
_LOADED = f"coremltools.{_BLOBS}"  # where coremltools looks: it cannot be loaded twice


@cache
def messages(name: str) -> Any:
    """The module of a .proto file, such as "MIL" or "Model".

    Raises:
        DependencyMissing: coremltools is not installed.
    """
    if _PACKAGE not in sys.modules:
        folder = _folder() / "proto"
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None, "a file has a loader"
        sys.modules[_PACKAGE] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return import_module(f"{_PACKAGE}.{name}_pb2")


@cache
def blob_library() -> Any:
    """Apple's own reader and writer of weight files, a compiled module of coremltools.

    Raises:
        DependencyMissing: coremltools is not installed, or was built without it.
    """
    if _LOADED in sys.modules:
        return sys.modules[_LOADED]
    (path, *_) = [*_folder().glob(f"{_BLOBS}*.so"), None]
    if path is None:
        raise _missing(f"it has no {_BLOBS}: it was built for another system")
    loader = ExtensionFileLoader(_BLOBS, str(path))
    spec = importlib.util.spec_from_loader(_BLOBS, loader)
    assert spec is not None, "it was given its loader"
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_LOADED] = module
    return module


def _folder() -> Path:
    spec = importlib.util.find_spec("coremltools")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("its messages define what a package is made of")
    return Path(spec.submodule_search_locations[0])


def _missing(why: str) -> DependencyMissing:
    return DependencyMissing(
        "Core ML packages need coremltools", why, "pip install -c constraints.txt coremltools"
    )
