"""What a phone needs to run the file: the oldest llama.cpp build, and code that loads it.

Builds are llama.cpp's release tags, chosen a little after the change they need was merged; each
names that change. Slimport itself judges with one recent build only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ...architectures import DecoderConfig
from ...quantize.plan import Plan
from ...tokenizer.tokenizer import Tokenizer
from ..container import Minimum

# (what a file may need, release that has it, the pull request that brought it)
_ARCHITECTURES = {
    "llama": (3000, "tied embeddings and pre-tokenizers of Llama files, #6920"),
    "qwen2": (3000, "the Qwen2 pre-tokenizer, #7114"),
    "qwen3": (5092, "the Qwen3 architecture, #12828"),
    "gemma": (3000, "the Gemma architecture, #5631"),
    "gemma2": (3500, "the Gemma 2 architecture and its sliding window, #8227"),
    "gemma3": (5092, "the Gemma 3 architecture, #12343"),
    "smollm3": (6000, "the SmolLM3 architecture, #14581"),
    "olmo2": (4500, "the OLMo 2 architecture, #10394"),
    "phi3": (5600, "Phi-3 without its window, #13194"),
    "granite": (4000, "the Granite architecture, #9412"),
}
_LLAMA3_ROPE = (3500, "the rope_freqs tensor of Llama 3.1, #8676")
_Q2_0 = (11549, "the type Q2_0; no older build was tried")
_TERNARY = (3700, "the types TQ1_0 and TQ2_0, #8151")
# k-quants and i-quants are older than any build named here.
_GRIDS = {
    "int2-g64": _Q2_0,
    "Q2_0": _Q2_0,
    "int2-g256": _TERNARY,
    "TQ1_0": _TERNARY,
    "TQ2_0": _TERNARY,
    "MXFP4": (6100, "the type MXFP4, #15091"),
}
_ADAPTER = (4000, "GGUF adapters, #8332")
_OLD_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2")  # pre-tokenizers that those builds know
_NEW_TOKENIZERS = ("seed-coder", "jais-2", "qwen35", "exaone-moe", "minicpm5")
_NEW_TOKENIZER = (11549, "a recent pre-tokenizer; no older build was tried")
_OTHER_TOKENIZER = (5092, "a pre-tokenizer added after 2024")


def minimum_runtime(
    config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
) -> Minimum:
    """The oldest llama.cpp build that reads the file, such as "b3000", and why."""
    needs = [_ARCHITECTURES[config.family.gguf]]
    needs += [_GRIDS[c.grid.name] for c in plan.quantized if c.grid and c.grid.name in _GRIDS]
    if config.rope.kind == "llama3":
        needs.append(_LLAMA3_ROPE)
    if tokenizer.kind == "bpe" and tokenizer.pre not in _OLD_TOKENIZERS:
        needs.append(_NEW_TOKENIZER if tokenizer.pre in _NEW_TOKENIZERS else _OTHER_TOKENIZER)
    if separate:
        needs.append(_ADAPTER)
    build, reason = max(needs)
    return Minimum("llama.cpp", f"b{build}", reason)


def readme(fields: Mapping[str, str], adapters: list[str]) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md, `adapters` are file names."""
    template = Template((Path(__file__).parent / "README.bundle.md").read_text(encoding="utf-8"))
    rows = "".join(f"| `{name}` | a LoRA adapter, applied at run time |\n" for name in adapters)
    first = adapters[0] if adapters else ""
    return template.substitute(
        fields,
        adapter_row=rows,
        adapter_code=_adapter_code(adapters),
        adapter_push=f"    adb push {first} /data/local/tmp/\n" if first else "",
        adapter_flag=f" --lora {Path(first).name}" if first else "",
    )


def _adapter_code(adapters: list[str]) -> str:
    if not adapters:
        return ""
    return (
        f'llama_adapter_lora * adapter = llama_adapter_lora_init(model, "{adapters[0]}");\n'
        "float scale = 1.0f;                                   // the true scale is in the file\n"
        "llama_set_adapters_lora(context, &adapter, 1, &scale);"
    )
