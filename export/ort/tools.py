"""ONNX Runtime's own Python code for its format.

The package that it lies in imports torch, which a reader must not cost, and sets up logging.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = "onnxruntime.tools"


@cache
def format_tools() -> Any:
    """The package onnxruntime.tools.ort_format_model."""
    spec = find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    bare = ModuleType(_PACKAGE)
    bare.__path__ = [str(Path(spec.origin).parent / "tools")]
    handlers = list(logging.root.handlers)
    imported = sys.modules.setdefault(_PACKAGE, bare)
    try:
        from onnxruntime.tools import ort_format_model
    finally:
        if imported is bare:
            del sys.modules[_PACKAGE]
        logging.root.handlers[:] = handlers
    return ort_format_model


def generated() -> Any:
    """The readers that flatbuffers' compiler made from ort.fbs, a module for each table."""
    format_tools()
    import ort_flatbuffers_py.fbs  # format_tools puts it on the path

    return ort_flatbuffers_py.fbs
