"""Damage: Apple's loader runs it with other numbers or ends the process; here it is refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="the extra coreai is not installed")

from slimport.errors import BadInput, SlimportError, ValidationFailed
from slimport.export import coreai as container
from slimport.export.coreai.asset import HASH, PROGRAM
from slimport.export.coreai.bytecode import Skeleton
from slimport.export.coreai.reader import File

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def copy(exported: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    model, folder = exported
    return model, shutil.copytree(folder, tmp_path / "copy")


def stamp(folder: Path, data: bytes) -> None:
    """Write a program with the hash that it should have."""
    (folder / PROGRAM).write_bytes(data)
    (folder / HASH).write_bytes(hashlib.sha256(data).digest())


def test_a_flipped_bit_is_found_by_the_hash_and_by_the_digest(copy: tuple[Any, Path]) -> None:
    model, folder = copy
    place, size = File(folder).blobs[f"{DOWN}.codes"]
    data = bytearray((folder / PROGRAM).read_bytes())
    data[place + size // 2] ^= 1
    (folder / PROGRAM).write_bytes(data)
    with pytest.raises(BadInput, match=r"not the one in main\.hash"):
        container.check(model, folder)
    stamp(folder, bytes(data))
    with pytest.raises(ValidationFailed, match=rf"(?s){DOWN}.weight: .*codes \["):
        container.check(model, folder)


@pytest.mark.parametrize("name", [HASH, PROGRAM])
def test_a_missing_file(name: str, copy: tuple[Any, Path]) -> None:
    model, folder = copy
    (folder / name).unlink()
    with pytest.raises(BadInput):
        container.check(model, folder)


def test_a_program_that_is_cut_short_anywhere(copy: tuple[Any, Path]) -> None:
    model, folder = copy
    data = (folder / PROGRAM).read_bytes()
    for stop in [*range(0, 64), *range(64, len(data), len(data) // 150), len(data) - 1]:
        stamp(folder, data[:stop])
        with pytest.raises(BadInput):
            container.check(model, folder)


def test_bytes_that_say_something_else_are_never_a_crash(copy: tuple[Any, Path]) -> None:
    model, folder = copy
    data = (folder / PROGRAM).read_bytes()
    blobs = File(folder).blobs.values()
    first, last = min(start for start, _ in blobs), max(sum(each) for each in blobs)
    around = [*range(first), *range(last, len(data))]
    random, refused = np.random.default_rng(0), 0
    for place in random.choice(around, 400, replace=False):
        damaged = bytearray(data)
        damaged[place] = random.integers(256)
        stamp(folder, bytes(damaged))
        try:
            container.check(model, folder)  # what operations say is not read
        except SlimportError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_constant_of_another_size(part: str, copy: tuple[Any, Path]) -> None:
    model, folder = copy
    data = (folder / PROGRAM).read_bytes()
    contents = {
        name: data[start : start + size] for name, (start, size) in File(folder).blobs.items()
    }
    name = f"{DOWN}.{part}"
    contents[name] = contents[name][:-64]
    sizes = {name: len(content) for name, content in contents.items()}
    pieces = Skeleton(data).parts(sizes)
    stamp(folder, b"".join(contents[p] if isinstance(p, str) else p for p in pieces))
    with pytest.raises(BadInput, match=rf"{name} has \d+ bytes and not \d+"):
        container.check(model, folder)


def test_a_program_is_written_again_as_it_was(exported: tuple[Any, Path]) -> None:
    data = (exported[1] / PROGRAM).read_bytes()
    blobs = File(exported[1]).blobs
    sizes = {name: size for name, (_, size) in blobs.items()}
    pieces = [
        data[blobs[p][0] : sum(blobs[p])] if isinstance(p, str) else p
        for p in Skeleton(data).parts(sizes)
    ]
    assert b"".join(pieces) == data
    assert Skeleton(data).nbytes(sizes) == len(data)
