"""What a phone needs to run the file, and code that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import Minimum
from ..executorch import device
from ..executorch.device import EXECUTORCH

_NOTE = (
    "Try the file on the phones that it is for before it is shipped: no GPU executed it. Its"
    " structure was checked, and an eager model that reads the very same program was judged."
)


def minimum_runtime() -> Minimum:
    """The release that the program was written for, from its sources."""
    reason = "the release whose Vulkan backend the program was written for; no other was tried"
    return Minimum("executorch", EXECUTORCH, reason)


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Sentences on what was not executed, and on prompts."""
    return [_NOTE, *device.notes(config, plan, tokenizer)]


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    return template.substitute(fields, executorch=EXECUTORCH)
