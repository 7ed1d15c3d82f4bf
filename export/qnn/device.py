"""What a phone needs to run the files, and code that loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ..container import Minimum
from . import sdk

_ONNXRUNTIME, _QAIRT = "1.24", "2.51"


def minimum_runtime() -> Minimum:
    reason = (
        f"the plugin's own minimum; the context binaries were made with QAIRT {_QAIRT}, and another"
        " was not tried"
    )
    return Minimum("onnxruntime", f"{_ONNXRUNTIME} with {sdk.DISTRIBUTION} {sdk.VERSION}", reason)


def readme(fields: Mapping[str, str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    return template.substitute(fields, qairt=_QAIRT, distribution=sdk.VERSION)
