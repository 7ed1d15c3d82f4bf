"""Predicted losses against the divergence of models of which one weight is really quantized."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import Checkpoint
from slimport.errors import BadInput
from slimport.quantize import calibration, sensitivity
from slimport.quantize.calibration import layer_statistics
from slimport.quantize.grid import INT4_G32
from slimport.quantize.methods import gptq
from slimport.quantize.plan import Choice, make_plan
from slimport.quantize.sensitivity import Sensitivities, divergence, measure
from slimport.quantize.windows import Windows, read_text, token_windows, windows_of
from slimport.tokenizer.tokenizer import Tokenizer

STORYTELLER = Path(__file__).parents[2] / "examples" / "storyteller"


def options_of(
    config: Any, grids: tuple[str, ...], kept: Any, method: str = "rtn"
) -> dict[str, list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for grid in grids:
        for choice in make_plan(config, "int4", method, {"*": grid}).choices:
            if choice.grid is not None and kept(choice.weight):
                found.setdefault(choice.weight.name, []).append(choice)
    return found


class Replaced:
    """Weights of which one is another."""

    def __init__(self, source: Checkpoint, name: str, values: Any) -> None:
        self._source, self._name, self._values = source, name, values
        self.names, self.shape = source.names, source.shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self._values if name == self._name else self._source.rows(name, start, stop)


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_predicted_losses_are_near_those_of_a_trained_model() -> None:
    source = Checkpoint.open(STORYTELLER / "base")
    config = decoder_config(source.config)
    text = read_text(STORYTELLER / "data" / "calibration.txt")
    tokenizer = Tokenizer.open(STORYTELLER / "base")
    windows = token_windows(text, tokenizer, 128, 24, vocab_size=config.vocab_size)
    names = ("0.self_attn.q_proj", "1.self_attn.v_proj", "2.mlp.down_proj", "3.mlp.up_proj")
    options = options_of(
        config, ("int4-g32",), lambda weight: any(f".{n}." in weight.name for n in names), "gptq"
    )
    found = measure(source, config, windows, options, silent)
    hessians = {}
    with contextlib.closing(layer_statistics(source, config, windows)) as layers:
        _, statistics = next(layers)
        for _ in range(1, config.layers):
            hessians |= {name: statistics[name].hessian for name in options if name in statistics}
            _, statistics = layers.send({})
        hessians |= {name: statistics[name].hessian for name in options if name in statistics}
    for name in options:
        solved = gptq.solve(source.rows(name), INT4_G32, hessians[name]).dequantize()
        real = divergence(source, Replaced(source, name, solved), config, windows, silent)
        assert 0.4 < found[name]["int4-g32"] / real < 2.5, (name, found[name], real)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_tried_out(tied: bool, make_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 100)
    source = Checkpoint.open(make_model("llama", tie_word_embeddings=tied))
    config = decoder_config(source.config)
    windows = some_windows()
    options = options_of(config, ("int4-g32", "int8-row"), lambda weight: weight.is_table)
    found = measure(source, config, windows, options, silent)
    assert len(options) == (1 if tied else 2)
    for name, choices in options.items():
        for choice in choices:
            assert choice.grid is not None
            changed = sensitivity._Changed(source, choice)
            real = divergence(source, changed, config, windows, silent)
            assert found[name][choice.grid.name] == pytest.approx(real, rel=1e-6)
        assert found[name]["int8-row"] < found[name]["int4-g32"] / 10


@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "granite"])
def test_every_matrix_of_other_families_has_losses(family: str, make_model: Any) -> None:
    source = Checkpoint.open(make_model(family))
    config = decoder_config(source.config)
    options = options_of(config, ("int8-row", "int4-g32"), lambda weight: weight.is_linear)
    found = measure(source, config, some_windows(), options, silent)
    assert found.keys() == options.keys()
    for name, row in found.items():
        assert 0 < row["int8-row"] < row["int4-g32"], name


def some_windows() -> Windows:
    ids = np.random.default_rng(0).integers(0, 400, (5, 32))
    return windows_of(ids.astype(np.int32))


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    given = Sensitivities({"a.weight": {"int4-g32": 0.1, "Q6_K": 1e-9}}, {"base": "sha256:0"})
    given.write(tmp_path / "new" / "s.json")
    assert Sensitivities.read(tmp_path / "new" / "s.json") == given
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    "words",
    [
        "{}",
        "[]",
        '{"schema": "slimport.sensitivities/1", "subject": {}, "losses": {"a": {"b": -1}}}',
        '{"schema": "slimport.sensitivities/1", "subject": {}, "losses": {"a": {"b": NaN}}}',
        '{"schema": "slimport.sensitivities/1", "subject": {}, "losses": {"a": 1}}',
        '{"schema": "slimport.sensitivities/2", "subject": {}, "losses": {}}',
    ],
)
def test_other_files_are_refused(words: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(words)
    with pytest.raises(BadInput):
        Sensitivities.read(tmp_path / "s.json")
