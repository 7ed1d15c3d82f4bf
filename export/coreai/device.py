"""What a device needs to run an .aimodel, and what is known of loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import Minimum, normalization_notes
from ..coreml import device as coreml

IOS = 27
_EXECUTED = (
    "Try the model on the devices that it is for before it is shipped: Apple's own runtime executed"
    " this very file, on a Linux CPU and on no device, and iOS 27 is a beta."
)
_TOKENIZER = (
    "Core AI has no tokenizer: the app reads tokenizer.json with Hugging Face's swift-transformers,"
    " and renders the chat template by itself."
)


def minimum_runtime() -> Minimum:
    """The first iOS with Core AI."""
    return Minimum("iOS", str(IOS), "the first with Core AI; a beta when this was written")


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Sentences on what was not executed, and on prompts."""
    return [_EXECUTED, _TOKENIZER, *normalization_notes(tokenizer, "swift-transformers")]


def properties(
    name: str, config: DecoderConfig, tokenizer: Tokenizer, context: int, digest: str
) -> dict[str, str]:
    """What an app can read of the model, under names of its metadata: as in Core ML's."""
    told = coreml.properties(name, config, tokenizer, context, digest)
    states = 2 * config.layers * config.kv_heads * config.head_dim  # numbers for each position
    told |= {"slimport.name": name, "slimport.states": str(states)}
    return {key: value for key, value in told.items() if key.startswith("slimport.")}


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    return template.substitute(fields)
