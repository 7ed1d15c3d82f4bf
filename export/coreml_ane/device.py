"""What an iPhone needs to run the packages, and code that loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...tokenizer.tokenizer import Tokenizer
from ..coreml import device
from .layout import CHUNK

_FUNCTION = "that name behind `decode_` or `prefill_`"


def properties(
    name: str, config: DecoderConfig, tokenizer: Tokenizer, context: int, digest: str, packages: int
) -> dict[str, str]:
    """What an app can read of each package, under names of its metadata."""
    found = device.properties(name, config, tokenizer, context, digest)
    return found | {"slimport.chunk": str(CHUNK), "slimport.packages": str(packages)}


def readme(fields: Mapping[str, str], adapters: Sequence[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    return template.substitute(fields, **device.adapter_fields(adapters, _FUNCTION))
