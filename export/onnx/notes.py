"""What a user of the files must know: what genai leaves to the app, and what is slow."""

from __future__ import annotations

from ...architectures import DecoderConfig
from ...quantize.grid import Grid
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import normalization_notes
from . import template
from .genai import session_options
from .layout import FLOAT16, FLOAT32, Float
from .tokenizer import template_withheld

_RUNTIME = "onnxruntime-genai"


_GPU = (
    "The graph computes in float16 for a GPU, and no GPU executed it: it was judged on the CPU"
    " provider. The app has to append the provider of its GPU, and to see which operators that one"
    " leaves to the CPU; for the CPU alone take `--container onnx`."
)


def notes(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, activations: Float = FLOAT32
) -> list[str]:
    """Sentences on the GPU, prompts (normalization, BOS, chat template) and slow operators."""
    found = [_GPU] if activations == FLOAT16 else []
    found += normalization_notes(tokenizer, _RUNTIME)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.library.id_to_token(tokenizer.bos_id)
        found.append(
            f"{_RUNTIME} puts no BOS before a text: a prompt that is not made with the chat"
            f" template has to start with the text `{bos}`."
        )
    if reason := template_withheld(tokenizer):
        found.append(
            f"The chat template is not among the files, because {_RUNTIME} may render it otherwise:"
            f' {reason}. `apply_chat_template` says "Empty chat template"; the app has to write'
            " prompts as the template in `tokenizer/generation.json` does."
        )
    elif tokenizer.chat_template and template.trims(tokenizer.chat_template):
        found.append(
            f"The chat template trims texts, and {_RUNTIME} trims blanks, tabs and line ends only:"
            " the app has to trim what else Unicode has for spaces, such as U+00A0 and U+3000."
        )
    slow = sorted(
        {c.grid.name for c in plan.quantized if isinstance(c.grid, Grid) and c.grid.levels}
    )
    if slow:
        found.append(
            f"{', '.join(slow)} is a reference in ONNX Runtime: its operator is about two orders of"
            " magnitude slower than that of int4-g32."
        )
    if options := session_options(plan):
        stated = " and ".join(f"`{name}` to {value}" for name, value in options.items())
        found.append(
            "Scales are float16 numbers that KleidiAI's kernels for Arm cut: `genai_config.json`"
            f" sets {stated}, and an app that opens the model without it has to."
        )
    return found
