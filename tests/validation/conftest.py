"""Tiny random models, quantized and written as GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.export import gguf
from slimport.export.gguf import layout
from slimport.quantize.ggml import Type
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """A model folder, its quantized checkpoint, and the GGUF file of that."""

    model: Path
    quantized: Path
    file: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.model)


def export_gguf(
    model: Path, folder: Path, preset: str = "int4", pre: str | None = None, **patterns: str
) -> Exported:
    checkpoint = Checkpoint.open(model)
    plan = make_plan(decoder_config(checkpoint.config), preset, "rtn", patterns)
    quantized = quantize(
        checkpoint,
        checkpoint.config,
        plan,
        folder / "quantized",
        calibration=None,
        tokenizer_folder=model,
        progress=lambda stage, done, total: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Beside float16 weights ggml rounds activations to float16 too: 1e-2 in these logits.
        patch.setattr(layout, "FLOAT_MATRIX", Type.F32)
        (file,) = gguf.write(quantized, Tokenizer.open(model, pre=pre), folder)
    return Exported(model, quantized.folder, file)


@pytest.fixture(scope="session")
def export_folder() -> Callable[..., Exported]:
    """export_folder(model, folder, preset, pre, **patterns) -> Exported."""
    return export_gguf


@pytest.fixture(scope="session")
def exported(make_model: Any, tmp_path_factory: Any) -> Callable[..., Exported]:
    """exported(family, preset, pre, **config) -> Exported.

    Preset "float" stores weights as float32, rounded to float16; `pre` overrides the pre-tokenizer
    in the file.
    """
    made: dict[str, Exported] = {}

    def export(
        family: str = "llama", preset: str = "float", pre: str | None = None, **config: Any
    ) -> Exported:
        key = repr((family, preset, pre, sorted(config.items())))
        if key not in made:
            model = make_model(family, **config)
            folder = tmp_path_factory.mktemp(f"{family}-{preset}")
            patterns = {"*": "float16"} if preset == "float" else {}
            grids = "int4" if preset == "float" else preset
            made[key] = export_gguf(model, folder, grids, pre, **patterns)
        return made[key]

    return export
