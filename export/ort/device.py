"""Code that loads the files on a phone, and how its reduced runtime is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ..onnx import device


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md: that of the ONNX container, and README.build.md."""
    section = (Path(__file__).parent / "README.build.md").read_text(encoding="utf-8")
    build = Template(section).substitute(onnxruntime=device.ONNXRUNTIME)
    files = "`model.ort` | the graph and the weights in ONNX Runtime's own format"
    return device.readme(fields, adapters, files, '"ort"', f"\n{build}")
