"""Programs of tiny models, made by Apple's converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimport.export import coreai as container
from slimport.export.container import Deployment
from slimport.tokenizer.tokenizer import Tokenizer


def write(model: Any, source: Path, target: Path, context: int = 64) -> Path:
    """Write the files and hold them to their predicted sizes; returns the program."""
    target.mkdir(exist_ok=True)
    tokenizer, deployment = Tokenizer.open(source), Deployment(context, ios=27)
    container.refuse(model.decoder, model.plan, tokenizer)
    container.refuse_deployment(model.plan, deployment)
    predicted = container.predict(model.decoder, model.plan, tokenizer, model.name, deployment)
    files = container.write(model, tokenizer, target, deployment)
    sizes = {file.relative_to(target).as_posix(): file.stat().st_size for file in files}
    assert sizes.keys() == predicted.keys()
    for name, size in sizes.items():
        if name not in container.ESTIMATED:
            assert predicted[name] == size, name
    program = container.FILE
    above = max(25_000, 10_500 * model.decoder.layers)  # layers that do not rotate are shorter
    assert sizes[program] < predicted[program] < sizes[program] + above, (sizes, predicted)
    return target / program


GRIDS = {
    "*.0.mlp.up_proj.weight": "nf4-g64",
    "*.0.mlp.gate_proj.weight": "float16",
    "*.1.self_attn.q_proj.weight": "int2-g64",
    "*.1.self_attn.k_proj.weight": "int4-g32-signed",
}


@pytest.fixture(scope="session")
def exported(
    tiny_llama: Path, in_memory: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A model with every grid that is held, and the folder of its files: copy before damage."""
    model, folder = in_memory(tiny_llama, "int4", GRIDS), tmp_path_factory.mktemp("coreai")
    write(model, tiny_llama, folder)
    return model, folder


@pytest.fixture(scope="session")
def export() -> Callable[..., Path]:
    """export(model, source, target, context=64) -> main.mlirb."""
    return write
