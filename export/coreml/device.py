"""What an iPhone needs to run a package, and code that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import Minimum, normalization_notes
from .decoder import masks
from .layout import release_of

_EXECUTED = (
    "Try the package on the iPhones that it is for before it is shipped: no phone ran it, and where"
    " the report names the MIL interpreter, Core ML did not either."
)
_TOKENIZER = (
    "Core ML has no tokenizer: the app reads tokenizer.json with Hugging Face's swift-transformers,"
    " and renders the chat template by itself."
)


_ADAPTERS = """
## Adapters

Each adapter is a function over the weights of the base; its file in `adapters/` names it. Before a
model is loaded, set `settings.functionName` to FUNCTION. The function without one is the base
alone. A state belongs to one adapter: keys and values of another are not its own.
"""


def minimum_runtime(plan: Plan) -> Minimum:
    """The iOS that has the operations of the package."""
    release = release_of(plan)
    reasons = {
        18: "states, and weights of codes with a scale for each block",
        26: "look-up tables whose values are multiplied by a scale for each block",
    }
    return Minimum("iOS", str(release.version), reasons[release.version])


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Sentences on what was not executed, and on prompts."""
    return [_EXECUTED, _TOKENIZER, *normalization_notes(tokenizer, "swift-transformers")]


def properties(
    name: str, config: DecoderConfig, tokenizer: Tokenizer, context: int, digest: str
) -> dict[str, str]:
    """What an app can read of the model, under names of its metadata."""
    found = {
        "co.huggingface.exporters.name": name,
        "slimport.context_length": str(context),
        "slimport.heads": str(config.heads),
        "slimport.stop_tokens": ",".join(map(str, tokenizer.eos_ids)),
        "slimport.weights_digest": digest,
    }
    if not config.reward:
        found["slimport.vocab_size"] = str(config.vocab_size)
    elif config.pad_id is not None:
        found["slimport.pad_token"] = str(config.pad_id)
    if tokenizer.bos_id is not None:
        found["slimport.bos_token"] = str(tokenizer.bos_id)
    if (window := masks(config, context).get(True)) is not None:
        found["co.huggingface.exporters.sliding_window"] = str(window)
    return found


def readme(fields: Mapping[str, str], adapters: Sequence[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md, or that of a reward model."""
    page = "README.reward.md" if fields["kind"] == "reward" else "README.bundle.md"
    template = Template((Path(__file__).parent / page).read_text(encoding="utf-8"))
    return template.substitute(fields, **adapter_fields(adapters))


def adapter_fields(adapters: Sequence[str], function: str = "that name") -> dict[str, str]:
    """What a README says of separate adapters, of their files `adapters/NAME.json`.

    Args:
        function: the name of a function, in words.
    """
    if not adapters:
        return {"adapter_row": "", "adapter_section": ""}
    row = "".join(
        f"| `{each}` | the function of an adapter, in the package |\n" for each in adapters
    )
    return {"adapter_row": row, "adapter_section": _ADAPTERS.replace("FUNCTION", function)}
