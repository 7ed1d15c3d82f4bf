"""Several processes of torchrun on one CPU: the same training as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slimport.errors import UsageError
from slimport.quantize.qat.workers import start_workers
from slimport.quantize.store import QuantizedCheckpoint

Run = Callable[..., Any]

# As `slimport`, but with DIE set every process dies after the first state was saved.
SCRIPT = """
import os, sys
from slimport.cli import main
from slimport.quantize.qat import state

save = state.Store.save

def save_and_die(self, *arguments):
    save(self, *arguments)
    arguments[-1].wait()
    os._exit(9)

if os.environ.get("DIE"):
    state.Store.save = save_and_die
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = """
[qat]
steps = 36
batch = 4
train_length = 32
evaluate_every = 12
learning_rate = 0.3
norm_learning_rate = 0.001
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_share_batches_and_parameters_and_go_on_after_a_kill(
    make_model: Run, recipe_for: Run, run: Run, tmp_path: Path
) -> None:
    """DDP, and FSDP that was killed: curves and nearly all codes are those of one process."""
    config = recipe_for(tmp_path, make_model("llama", intermediate_size=128))
    config.write_text(config.read_text() + SETTINGS)
    (tmp_path / "shard.toml").write_text(config.read_text() + "shard = true\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    given = ["--preset", "int2", "--train", tmp_path / "train.txt"]
    assert run("qat", "--config", config, *given, "-o", tmp_path / "one", "-q").code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", tmp_path / "script.py", "qat", *given, "--config"]

    def start(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in (*torchrun, *arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, timeout=300
        )

    done = start(config, "-o", tmp_path / "ddp")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 36 of 36") == 1  # the first process speaks for both
    assert start(tmp_path / "shard.toml", "-o", tmp_path / "fsdp", DIE="1").returncode != 0
    assert not (tmp_path / "fsdp").exists()
    done = start(tmp_path / "shard.toml", "-o", tmp_path / "fsdp")
    assert done.returncode == 0, done.stderr
    assert "step 12 of 36" not in done.stderr and "step 24 of 36" in done.stderr
    one = _trained(tmp_path / "one")
    for folder, shard in (("ddp", False), ("fsdp", True)):
        found = _trained(tmp_path / folder)
        record, quantized = found
        assert (record["processes"], record["settings"]["shard"]) == (2, shard)
        for ours, theirs in zip(record["curve"], one[0]["curve"], strict=True):
            assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
        quantized.verify()
        for choice in quantized.plan.quantized:
            name = choice.weight.name
            pairs = zip(*(q.load(name).codes for q in (quantized, one[1])), strict=True)
            assert all((a == b).mean() > 0.95 for a, b in pairs), name


def _trained(folder: Path) -> tuple[dict[str, Any], QuantizedCheckpoint]:
    return json.loads((folder / "training.json").read_text()), QuantizedCheckpoint.open(folder)


def test_what_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="batch of 8") as refused:
        start_workers("cpu", False, 8)
    assert refused.value.cure == "give --batch 9"
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UsageError, match="there is one process"):
        start_workers("cpu", True, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="there is no GPU"):
        start_workers("cuda", False, 8)
    assert start_workers("auto", False, 8).device == torch.device("cpu")
