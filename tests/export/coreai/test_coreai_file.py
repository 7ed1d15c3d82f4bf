"""Whole programs: exact codes, the same bytes, and the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="the extra coreai is not installed")

from slimport.errors import Unsupported
from slimport.export import coreai as container
from slimport.export.coreai.layout import FAMILIES, FORMS
from slimport.quantize.grid import GRIDS
from slimport.quantize.tensor import QuantizedTensor, weights_digest
from slimport.validation.runtimes import coreai as runtime


def test_every_code_comes_back(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    assert {grid.name for grid in map(GRIDS.get, model.grids.values()) if grid} == set(FORMS)
    found, digests = container.check(model, folder), {}
    for name, tensor in container.read_back(folder, model.decoder, model.grids):
        expected = model.tensors[name]
        if isinstance(expected, QuantizedTensor):
            assert isinstance(tensor, QuantizedTensor) and tensor.grid is expected.grid
            np.testing.assert_array_equal(tensor.codes, expected.codes)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
            digests[name] = expected.digest(name)
        else:
            np.testing.assert_array_equal(tensor, expected)
    assert found.digests == digests and found.weights_digest == weights_digest(digests)
    assert set(found.float_errors.values()) == {0.0}


def test_apples_runtime_computes_what_transformers_does_with_the_codes(
    exported: tuple[Any, Path], tiny_llama: Path, oracle: Any, tmp_path: Path
) -> None:
    model, folder = exported
    ids = np.random.default_rng(1).integers(0, 400, (2, 40), dtype=np.int32)
    runtime.logits(folder / container.FILE, ids, tmp_path / "out.npy")
    wanted = oracle(tiny_llama, ids, model.tensors)
    assert np.abs(np.load(tmp_path / "out.npy") - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_every_family_that_is_not_refused_computes_what_transformers_does(
    variant: Any, make_model: Any, in_memory: Any, export: Any, oracle: Any, tmp_path: Path
) -> None:
    family, overrides = variant
    source = make_model(family, **overrides)
    model = in_memory(source)
    if family not in FAMILIES:
        with pytest.raises(Unsupported, match=f"the family {family} cannot go to Core AI yet"):
            export(model, source, tmp_path / "files")
        return
    program = export(model, source, tmp_path / "files")
    container.check(model, tmp_path / "files")
    ids = np.random.default_rng(1).integers(0, 400, (2, 40), dtype=np.int32)
    runtime.logits(program, ids, tmp_path / "out.npy")
    wanted = oracle(source, ids, model.tensors)
    assert np.abs(np.load(tmp_path / "out.npy") - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_two_exports_have_the_same_bytes(
    tiny_llama: Path, in_memory: Any, export: Any, tmp_path: Path
) -> None:
    for name in "ab":
        export(in_memory(tiny_llama), tiny_llama, tmp_path / name)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in "ab"
    )
    assert first == second and len(first) == 6
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_names_and_metadata_are_those_that_the_readme_says(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    told = json.loads((folder / "Model.aimodel/metadata.json").read_text())
    assert told["assetVersion"] == "2.0" and "creationDate" not in told
    notes = told["creatorDefinedMetadata"]
    assert notes["slimport.context_length"] == "64"
    assert notes["slimport.weights_digest"] == model.weights_digest
    program = (folder / container.FILE).read_bytes()
    for name in (b"tokens", b"position", b"logits", b"keys_0", b"values_1"):
        assert b"\0" + name + b"\0" in program
    assert b"sdpa_0" in program and str(Path.home()).encode() not in program
