"""Method auto: in each layer the method whose logits lie nearest, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from slimport.architectures import DecoderConfig, decoder_config
from slimport.checkpoint import Checkpoint, Weights
from slimport.decoder import logits
from slimport.quantize import calibration, layers
from slimport.quantize.calibration import Passage, same_threads
from slimport.quantize.methods import autoround
from slimport.quantize.plan import make_plan
from slimport.quantize.quantizer import quantize
from slimport.quantize.store import QuantizedCheckpoint, Record
from slimport.quantize.windows import Windows, windows_of

PATTERNS = {"*.down_proj.*": "int4-g32", "*.0.self_attn.q_proj.*": "nf4-g64"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches of eight windows, of which the fourth is held; 10 steps."""
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 512)
    monkeypatch.setattr(autoround, "_STEPS", 10)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return windows_of(np.random.default_rng(0).integers(0, 400, (48, 64)))


def made(folder: Path, source: Checkpoint, windows: Windows, **plan: object) -> QuantizedCheckpoint:
    decoder = decoder_config(source.config)
    return quantize(
        source,
        source.config,
        make_plan(decoder, **({"preset": "int2", "method": "auto", "patterns": PATTERNS} | plan)),
        folder,
        calibration=windows,
        tokenizer_folder=source.folder,
        progress=lambda *_: None,
    )


class Linears:
    """The Linears of a quantized model in the full-precision one."""

    def __init__(self, base: Weights, quantized: QuantizedCheckpoint) -> None:
        self.base, self.quantized = base, quantized

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        linear = self.quantized.plan[name].weight.is_linear
        return (self.quantized if linear else self.base).rows(name, start, stop)


def divergence(
    source: Weights, found: QuantizedCheckpoint, config: DecoderConfig, ids: np.ndarray
) -> float:
    tokens = torch.from_numpy(ids).long()
    with same_threads():
        expected, given = (
            logits(tokens, weights, config).double().log_softmax(-1)
            for weights in (source, Linears(source, found))
        )
    return (expected.exp() * (expected - given)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "olmo2"])  # tied, and with a head of its own
def test_the_best_method_of_each_layer_is_kept(
    make_model: Callable[..., Path], family: str, windows: Windows, tmp_path: Path
) -> None:
    source = Checkpoint.open(make_model(family))
    model = made(tmp_path / "auto", source, windows)
    assert [*model.layers] == ["0", "1"]
    for told in model.layers.values():
        assert [*told["kl"]] == ["rtn", "hqq", "gptq", "autoround"]
        assert told["kl"][told["method"]] == min(told["kl"].values())
        assert set(told["learnt"]) == {"before", "after", "steps"}
    last = model.layers["1"]
    found = divergence(source, model, model.decoder, windows.ids[24:32])
    assert last["kl"][last["method"]] == pytest.approx(found, rel=1e-4)


def test_the_winner_is_what_ships(
    tiny_llama: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever method is called the best, its codes are in the file."""
    source = Checkpoint.open(tiny_llama)
    single = {}
    for name in ("rtn", "hqq"):
        model = made(tmp_path / name, source, windows, method=name)
        linears = [c.weight.name for c in model.plan.quantized if c.weight.is_linear]
        single[name] = {linear: model.records[linear] for linear in linears}
    assert single["rtn"] != single["hqq"]
    monkeypatch.setattr(layers, "CANDIDATES", ("hqq", "rtn"))
    for best, records in single.items():

        def distance(
            self: layers.Solver,
            solved: layers.Solved,
            passage: Passage,
            records: Mapping[str, Record] = records,
        ) -> float:
            name = f"model.layers.{passage.index}.self_attn.k_proj.weight"
            return float(solved.tensors[name].digest(name) != records[name].digest)

        monkeypatch.setattr(layers.Solver, "_distance", distance)
        model = made(tmp_path / f"best-{best}", source, windows)
        assert {name: model.records[name] for name in records} == records
        assert {told["method"] for told in model.layers.values()} == {best}


def test_grids_of_other_kinds_try_what_they_take(
    make_model: Callable[..., Path], windows: Windows, tmp_path: Path
) -> None:
    """Q4_0 takes no hqq and no learning, lut4 neither; a whole layer of nf4 has no choice."""
    source = Checkpoint.open(make_model("llama", hidden_size=64, intermediate_size=128))
    patterns: Mapping[str, str] = {
        "*.layers.0.*": "Q4_0",
        "*.layers.1.*": "nf4-g64",
        "*.layers.0.self_attn.o_proj.*": "lut4-r16",
    }
    model = made(tmp_path / "mixed", source, windows, patterns=patterns)
    assert [*model.layers] == ["0"]
    assert [*model.layers["0"]["kl"]] == ["rtn", "gptq", "imatrix"]
    assert "learnt" not in model.layers["0"]


def test_two_runs_write_the_same_bytes(tiny_llama: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    first, second = (made(tmp_path / name, source, windows) for name in "ab")
    assert first.layers == second.layers
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


def test_a_reward_model_is_measured_by_its_scores(
    make_model: Callable[..., Path], windows: Windows, tmp_path: Path
) -> None:
    source = Checkpoint.open(make_model("qwen2", reward=True))
    model = made(tmp_path / "reward", source, windows)
    for told in model.layers.values():
        assert "kl" not in told
        assert told["score_error"][told["method"]] == min(told["score_error"].values())
    assert asdict(model.records["score.weight"])["error"] == 0


def test_the_command_tells_what_won(
    tiny_llama: Path, run: Callable[..., object], recipe_for: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path / "r", tiny_llama)
    command = ("quantize", "--config", recipe, "--preset", "int4", "--method", "auto", "-q")
    done = run(*command, "-o", tmp_path / "q", "--json")
    assert done.code == 0, done.err
    assert set(done.json["layers"]["1"]["kl"]) == {"rtn", "hqq", "gptq", "autoround"}
    assert QuantizedCheckpoint.open(tmp_path / "q").layers == done.json["layers"]
