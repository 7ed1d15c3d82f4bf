"""What a runner asks a program, what a phone needs to run it, and code that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from .. import flatbuffer
from ..container import Minimum, normalization_notes
from .layout import MODEL, WEIGHTS
from .program import constant_method
from .tokenizer import TOKENIZER

EXECUTORCH = "1.4.1"
_RUNTIME = "ExecuTorch"


def metadata(config: DecoderConfig, tokenizer: Tokenizer, context: int) -> list[flatbuffer.Values]:
    """Methods that ExecuTorch's runner of language models calls before it runs one.

    The longest run is the whole context: with a shorter one the runner takes the model for one
    that forgets old tokens by itself, and goes on until a kernel fails at the end of the cache.
    """
    numbers: dict[str, int | bool] = {
        "get_vocab_size": config.vocab_size,
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": config.layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    if tokenizer.bos_id is not None:
        numbers["get_bos_id"] = tokenizer.bos_id
    methods = [constant_method(name, number) for name, number in numbers.items()]
    return [*methods, constant_method("get_eos_ids", *tokenizer.eos_ids)]


def minimum_runtime() -> Minimum:
    """The release that was run, because no older one was."""
    reason = "the release that judges the file here; no older one was tried"
    return Minimum("executorch", EXECUTORCH, reason)


def notes(config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Sentences on prompts: normalization, BOS, chat template."""
    found = normalization_notes(tokenizer, _RUNTIME)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.library.id_to_token(tokenizer.bos_id)
        found.append(
            f"ExecuTorch's runner puts no BOS before a prompt: one begins with `{bos}`, but for a"
            " chat whose template writes it. Leave the count of BOS at 0: Android ignores that of"
            " LlmGenerationConfig."
        )
    if tokenizer.chat_template:
        found.append(
            "ExecuTorch's runner takes prompts as they are: the app has to write chats as the"
            " template in `tokenizer/generation.json` does."
        )
    found.append(
        "ExecuTorch's runner hands the app the text of the token that ends an answer too, takes the"
        " first token after a prompt for no end and without temperature, and on iOS loses a token"
        " that is a part of a character."
    )
    return found


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md, `adapters` are file names."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    rows = "".join(
        f"| `{name}` | the program with an adapter: open it in the place of `{MODEL}` |\n"
        for name in adapters
    )
    code = _sharing(adapters[0]) if adapters else _WHOLE
    return template.substitute(fields, **code, adapter_rows=rows, executorch=EXECUTORCH)


_WHOLE = {
    "model_rows": f"| `{MODEL}` | the program and the weights |\n",
    "opened": f'"{MODEL}", "{TOKENIZER}"',
    "ends": '"pte"',
    "names": f'"{MODEL}", "{TOKENIZER}"',
    "given": "files[0], files[1], 0.7f",
    "swift_adapters": "",
}


def _sharing(program: str) -> dict[str, str]:
    """As _WHOLE, for the program of an adapter that takes its weights from the file beside it."""
    return {
        "model_rows": f"| `{MODEL}` | the program of the base |\n"
        f"| `{WEIGHTS}` | the weights that all programs share |\n",
        "opened": f'"{program}", "{TOKENIZER}", "{WEIGHTS}"',
        "ends": '"pte", "ptd"',
        "names": f'"{program}", "{TOKENIZER}", "{WEIGHTS}"',
        "given": "LlmModule.MODEL_TYPE_TEXT, files[0], files[1], 0.7f, listOf(files[2])",
        "swift_adapters": "`TextRunner` of this release opens a program alone, without the weights"
        " beside it. An app calls `create_text_llm_runner(program, tokenizer, {weights})` of"
        " `executorch/extension/llm/runner/llm_runner_helper.h` in C++, or ships a bundle of"
        " `--adapter-mode merged`, for which this is the code:\n\n",
    }
