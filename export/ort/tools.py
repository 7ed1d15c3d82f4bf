"""ONNX Runtime's own Python code for its format, which also sets up logging when imported."""

from __future__ import annotations

import logging
from typing import Any


def format_tools() -> Any:
    """The package onnxruntime.tools.ort_format_model."""
    handlers = list(logging.root.handlers)
    from onnxruntime.tools import ort_format_model

    logging.root.handlers[:] = handlers
    return ort_format_model


def generated() -> Any:
    """The readers that flatbuffers' compiler made from ort.fbs, a module for each table."""
    format_tools()
    import ort_flatbuffers_py.fbs  # onnxruntime.tools puts it on the path

    return ort_flatbuffers_py.fbs
