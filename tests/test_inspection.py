"""`inspect` on everything it takes, as JSON and as a table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport import bundle

Run = Callable[..., Any]


def test_a_model(tiny_qwen3: Path, run: Run) -> None:
    found = run("inspect", tiny_qwen3, "--json").json
    assert found["kind"] == "model"
    assert found["decoder"]["family"] == "qwen3"
    assert found["tokenizer"]["pre"] == "qwen2"
    assert found["parameters"] == sum(  # counted by hand: three layers of width 64
        [416 * 64, 64, 3 * (2 * 64 + 2 * 32), 3 * (2 * 128 * 64 + 2 * 64 * 64 + 3 * 64 * 96)]
    )
    assert found["plan"]["weights"]["model.embed_tokens.weight"]["grid"] == "int8-row"


def test_a_bundle_and_its_file(finished: Path, run: Run) -> None:
    found = run("inspect", finished, "--json").json
    manifest = bundle.read_manifest(finished)
    assert found["kind"] == "bundle"
    assert found["bundle_digest"] == manifest["bundle_digest"]
    assert {row["grid"] for row in found["plan"]["summary"]} == {"int4-g32", "int8-row"}
    file = run("inspect", finished / "model.gguf", "--json").json
    assert file["kind"] == "gguf"
    assert file["tensors"] == {"F32": 5, "Q4_0": 14, "Q8_0": 1}
    assert file["metadata"]["general.architecture"] == "llama"
    assert file["bytes"] == (finished / "model.gguf").stat().st_size


@pytest.mark.parametrize("part", ["", "model.gguf"])
def test_tables(part: str, finished: Path, run: Run) -> None:
    done = run("inspect", finished / part)
    assert done.code == 0, done.err
    assert ("gguf" if part else "bundle_digest") in done.out


def test_a_model_as_a_table(tiny_llama: Path, run: Run) -> None:
    done = run("inspect", tiny_llama)
    assert done.code == 0, done.err
    assert "decoder.hidden_size" in done.out and "int4-g32" in done.out


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_a_broken_file(content: bytes, run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    done = run("inspect", tmp_path / "model.gguf")
    assert done.code == 7, done.err


def test_a_damaged_bundle(finished: Path, run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "pocket")
    (folder / "manifest.json").write_text('{"schema": "slimport.bundle/1"}')
    assert run("inspect", folder).code == 7
