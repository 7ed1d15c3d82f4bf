"""Context binaries of tiny models, compiled and run on the emulator of the NPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimport.export import qnn as container
from slimport.export.container import Deployment
from slimport.quantize.windows import Windows, windows_of
from slimport.tokenizer.tokenizer import Tokenizer


def random_windows(vocabulary: int, seed: int, count: int = 2, length: int = 64) -> Windows:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, length), dtype=np.int32)
    return windows_of(ids)


def write(model: Any, source: Path, target: Path, hexagon: int = 73, context: int = 96) -> Path:
    """Write the files and hold them to their predicted sizes; returns the first."""
    deployment = Deployment(
        context, hexagon=hexagon, calibration=random_windows(model.decoder.vocab_size, 5, 4)
    )
    tokenizer = Tokenizer.open(source)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    target.mkdir(exist_ok=True)
    files = container.write(model, tokenizer, target, deployment)
    sizes = {file.relative_to(target).as_posix(): file.stat().st_size for file in files}
    assert sizes.keys() == predicted.keys()
    for name, size in sizes.items():
        if name not in container.ESTIMATED:
            assert predicted[name] == size, name
    assert files[0].name == container.FILE
    return files[0]


@pytest.fixture(scope="session")
def export() -> Callable[..., Path]:
    """export(model, source, target, hexagon=73, context=96) -> decode.onnx."""
    return write


@pytest.fixture(scope="session")
def windows() -> Callable[..., Windows]:
    """windows(vocabulary, seed, count=2, length=64) -> Windows of random ids."""
    return random_windows
