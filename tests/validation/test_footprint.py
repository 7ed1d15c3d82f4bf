"""Bytes on disk, to download and in memory."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from slimport.errors import BadInput
from slimport.validation import footprint
from slimport.validation.runtime import Memory

MEMORY = Memory(mapped=100, repacked=50, kv_cache=20, compute=10)
WEIGHTS = ("mapped", "repacked")


def test_files_are_added_up(tmp_path):
    model, notes = tmp_path / "model.gguf", tmp_path / "notes.txt"
    model.write_bytes(np.random.default_rng(0).bytes(3 * 2**20 + 17))  # several pieces
    notes.write_bytes(b"again and again " * 10_000)
    found = footprint.footprint([notes, model], [model], MEMORY, ["arm64", "dotprod"], WEIGHTS)
    assert found.device_bytes == 3 * 2**20 + 17 + 160_000
    assert found.model_bytes == 3 * 2**20 + 17
    packed = sum(len(zlib.compress(path.read_bytes(), 6)) for path in (model, notes))
    assert abs(found.download_bytes - packed) < 16 * 4  # a header for each of four pieces
    assert model.stat().st_size < found.download_bytes < model.stat().st_size + 4000


def test_json_tells_what_is_predicted(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"12345678")
    found = footprint.footprint([file], [file], MEMORY, ["dotprod"], WEIGHTS).to_json()
    assert found["memory"] == {"mapped": 100, "repacked": 50, "kv_cache": 20, "compute": 10}
    assert found["predicted"] == {"for": ["dotprod"], "keys": ["memory.mapped", "memory.repacked"]}
    assert MEMORY.anonymous == 80 and MEMORY.total == 180


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="gone cannot be read"):
        footprint.footprint([tmp_path / "gone"], [], MEMORY, [], [])
