"""What a phone needs to run the files: the runtime that was tried, and code that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from ..container import Minimum
from .layout import FLOAT16, FLOAT32, Float

# onnxruntime and onnxruntime-genai that ran these operators; no older releases were tried.
ONNXRUNTIME, _GENAI = "1.31", "0.18"
# How the folder is opened: in Python and in Kotlin.
_ON_THE_CPU = ('model = genai.Model(".")', "    val model = Model(folder.path)")
_ON_A_GPU = (
    'config = genai.Config(".")\n'
    "config.clear_providers()\n"
    'config.append_provider("webgpu")  # or "cuda", "dml": what this onnxruntime-genai has\n'
    "model = genai.Model(config)",
    "    val config = Config(folder.path)\n"
    "    config.clearProviders()\n"
    '    config.appendProvider("webgpu")          // what this build of onnxruntime-genai has\n'
    "    val model = Model(config)",
)


def minimum_runtime() -> Minimum:
    """The releases that were run, because no older one was."""
    reason = "the releases that judge the files here; no older ones were tried"
    return Minimum("onnxruntime-genai", f"{_GENAI} with onnxruntime {ONNXRUNTIME}", reason)


def readme(
    fields: Mapping[str, str],
    adapters: list[str],
    model_row: str = "`model.onnx`, `model.onnx.data` | the graph and the weights",
    extensions: str = '"onnx", "data"',
    build: str = "",
    activations: Float = FLOAT32,
) -> str:
    """The bundle's README.md; `fields` fill README.bundle.md, `adapters` are file names.

    A reward model has a README of its own, and no adapters beside it.

    Args:
        model_row: the files of the model, and what they are, in a table.
        extensions: their ends, as Kotlin writes them.
        build: a section on how the runtime is built.
    """
    page = "README.reward.md" if fields["kind"] == "reward" else "README.bundle.md"
    template = Template((Path(__file__).parent / page).read_text(encoding="utf-8"))
    rows = "".join(f"| `{name}` | a LoRA adapter, applied at run time |\n" for name in adapters)
    python, kotlin = _ON_A_GPU if activations == FLOAT16 else _ON_THE_CPU
    return template.substitute(
        fields,
        adapter_row=rows,
        adapter_code=_adapter_code(adapters),
        model_row=model_row,
        extensions=extensions,
        build=build,
        open_python=python,
        open_kotlin=kotlin,
    )


def _adapter_code(adapters: list[str]) -> str:
    if not adapters:
        return ""
    name = Path(adapters[0]).stem
    return (
        "    val adapters = Adapters(model)\n"
        f'    adapters.loadAdapter(File(folder, "{adapters[0]}").path, "{name}")\n'
        f'    generator.setActiveAdapter(adapters, "{name}")     // one at a time, never two\n'
    )
