"""What every container refuses alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import Unsupported
from slimport.export.qnn import sdk
from slimport.quantize.plan import make_plan
from slimport.shipping import containers
from slimport.tokenizer.tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
PALETTES = ("coreml", "coreml-ane")  # hold them


@pytest.mark.parametrize("grid", ["lut4-r16", "lut6-r16"])
@pytest.mark.parametrize("name", [name for name in containers.NAMES if name not in PALETTES])
def test_palettized_grids_are_refused_with_a_cure(
    name: str, grid: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "version", lambda name: sdk.VERSION)
    config = decoder_config(Checkpoint.open(tiny_llama).config)
    tokenizer = Tokenizer.open(tiny_llama)
    container = containers.load(name).container
    for pattern in ("*.mlp.*", EMBEDDING):
        plan = make_plan(config, "int8", "rtn", {pattern: grid})
        with pytest.raises(
            Unsupported, match=f"cannot (hold|multiply|look up).* {grid}"
        ) as failure:
            container.refuse(config, plan, tokenizer)
        assert failure.value.exit_code == 5
        cure = failure.value.cure
        assert "int8-row" in cure or "int8-g32" in cure
        assert "--container" not in cure  # no other holds it
